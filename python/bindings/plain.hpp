// Plain result objects: read-only attributes, to_dict, repr, ==.
#pragma once

#include <functional>

#include "python/bindings/common.hpp"

namespace hqq::python {

// py::class_<T> whose fields are also listed for to_dict and repr, in the order they were added.
template <class T>
class PlainClass {
 public:
  PlainClass(py::module_& m, const char* name, const char* doc)
      : class_(m, name, doc), fields_(std::make_shared<Fields>()) {
    const std::string type = name;
    class_
        .def(
            "to_dict",
            [fields = fields_](const T& self) -> py::typing::Dict<py::str, py::object> {
              return to_dict(*fields, self, /*deep=*/true);
            },
            "All attributes as a dict of plain values.")
        .def("__repr__",
             [fields = fields_, type](const T& self) {
               return repr_of(type, to_dict(*fields, self, /*deep=*/false));
             })
        .def(
            "__eq__",
            [fields = fields_](const T& self, const py::object& other) {
              return py::isinstance<T>(other) &&
                     to_dict(*fields, self, true)
                         .equal(to_dict(*fields, other.cast<const T&>(), true));
            },
            py::is_operator());
  }

  // A read-only attribute; `get` maps const T& to anything pybind11 converts.
  template <class Get>
  PlainClass& field(const char* name, Get get, const char* doc) {
    class_.def_property_readonly(
        name, [get](const T& self) { return std::invoke(get, self); }, doc);
    fields_->emplace_back(name, [get](const T& self) -> py::object {
      if constexpr (std::is_base_of_v<py::handle, std::invoke_result_t<Get, const T&>>) {
        return std::invoke(get, self);
      } else {
        return py::cast(std::invoke(get, self));
      }
    });
    return *this;
  }

  py::class_<T>& bound() { return class_; }

 private:
  using Fields = std::vector<std::pair<std::string, std::function<py::object(const T&)>>>;

  // Lists of plain objects become lists of dicts.
  static py::object flatten(py::object value) {
    if (py::hasattr(value, "to_dict")) return value.attr("to_dict")();
    if (!py::isinstance<py::list>(value)) return value;
    py::list list;
    for (py::handle item : value) list.append(flatten(py::reinterpret_borrow<py::object>(item)));
    return list;
  }

  static py::dict to_dict(const Fields& fields, const T& self, bool deep) {
    py::dict dict;
    for (const auto& [name, get] : fields) {
      dict[py::str(name)] = deep ? flatten(get(self)) : get(self);
    }
    return dict;
  }

  py::class_<T> class_;
  std::shared_ptr<Fields> fields_;
};

}  // namespace hqq::python
