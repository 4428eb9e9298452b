// Python values <-> JSON, dtypes and shapes.
#include "python/bindings/config.hpp"
#include "src/base/json.hpp"
#include "src/config/config_json.hpp"

namespace hqq::python {
namespace {

Json from_number(py::handle value, const std::string& where) {
  // __index__ marks integers, NumPy's among them.
  if (PyIndex_Check(value.ptr()) != 0) {
    const auto index = py::reinterpret_steal<py::int_>(PyNumber_Index(value.ptr()));
    if (!index) throw py::error_already_set();
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (overflow != 0) throw_invalid(where, "an integer is too large: it has more than 64 bits");
    return number;
  }
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return number;
}

Json from_python(py::handle value, const std::string& where, int depth) {
  if (depth > kMaxJsonDepth) {
    throw_invalid(
        where, "it is nested deeper than " + std::to_string(kMaxJsonDepth) + " levels, the limit");
  }
  if (value.is_none()) return nullptr;
  if (py::isinstance<py::bool_>(value)) return value.cast<bool>();
  if (py::isinstance<py::str>(value)) return utf8_of(value);
  if (py::isinstance<LayerConfig>(value)) {
    return layer_config_to_json(value.cast<const LayerConfig&>());
  }
  if (PyMapping_Check(value.ptr()) != 0 && py::hasattr(value, "items")) {
    Json json = Json::object();
    for (py::handle item : value.attr("items")()) {
      const auto pair = py::reinterpret_borrow<py::tuple>(item);
      if (!py::isinstance<py::str>(pair[0])) {
        throw_invalid(where, "a key must be a string, not " + type_name(pair[0]));
      }
      const std::string key = utf8_of(pair[0]);
      // The one field for which NumPy and torch have types of their own.
      const bool is_dtype =
          key == "meta_dtype" && !pair[1].is_none() && !py::isinstance<py::str>(pair[1]);
      json[key] = is_dtype ? Json(std::string(dtype_name(dtype_from_python(
                                 pair[1], where, "float16, bfloat16 or float32"))))
                           : from_python(pair[1], where, depth + 1);
    }
    return json;
  }
  if (py::isinstance<py::list>(value) || py::isinstance<py::tuple>(value) ||
      py::isinstance<py::anyset>(value)) {
    Json json = Json::array();
    for (py::handle item : value) json.push_back(from_python(item, where, depth + 1));
    return json;
  }
  // NumPy's bool (bool_ before NumPy 2) has no __index__.
  const std::string type = type_name(value);
  if (type == "bool" || type == "bool_") return PyObject_IsTrue(value.ptr()) == 1;
  if (PyIndex_Check(value.ptr()) != 0 || PyFloat_Check(value.ptr()) ||
      py::hasattr(value, "__float__")) {
    return from_number(value, where);
  }
  throw_invalid(where, "a value of type " + type + " is not allowed here");
}

}  // namespace

std::string utf8_of(py::handle text) {
  Py_ssize_t size = 0;
  const char* bytes = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (bytes != nullptr) return std::string(bytes, static_cast<std::size_t>(size));
  if (PyErr_ExceptionMatches(PyExc_UnicodeEncodeError) == 0) throw py::error_already_set();
  PyErr_Clear();
  const auto repr = py::reinterpret_steal<py::object>(PyObject_ASCII(text.ptr()));
  if (!repr) throw py::error_already_set();
  const auto escaped = repr.cast<std::string>();
  throw_invalid("text", quote_name(std::string_view(escaped).substr(1, escaped.size() - 2)) +
                            " is not valid Unicode: it has half of a surrogate pair (U+D800 to "
                            "U+DFFF), which no file can hold");
}

Json json_from_python(py::handle value, const std::string& where) {
  return from_python(value, where, 0);
}

py::object json_to_python(const Json& json) {
  switch (json.type()) {
    case Json::value_t::null:
      return py::none();
    case Json::value_t::boolean:
      return py::bool_(json.get<bool>());
    case Json::value_t::number_integer:
      return py::int_(json.get<std::int64_t>());
    case Json::value_t::number_unsigned:
      return py::int_(json.get<std::uint64_t>());
    case Json::value_t::number_float:
      return py::float_(json.get<double>());
    case Json::value_t::string:
      return py::str(json.get_ref<const std::string&>());
    case Json::value_t::array: {
      py::list list;
      for (const Json& item : json) list.append(json_to_python(item));
      return list;
    }
    case Json::value_t::object: {
      py::dict dict;
      for (const auto& [key, value] : json.items()) dict[py::str(key)] = json_to_python(value);
      return dict;
    }
    default:
      throw std::logic_error("JSON value of a type that Python does not have");
  }
}

DType dtype_from_python(py::handle value, const std::string& where, const std::string& allowed) {
  std::string text;
  if (py::isinstance<py::str>(value)) {
    text = utf8_of(value);
  } else if (PyType_Check(value.ptr()) != 0 && py::hasattr(value, "__name__")) {
    text = value.attr("__name__").cast<std::string>();  // numpy.float16
  } else if (py::hasattr(value, "name")) {
    text = py::str(value.attr("name")).cast<std::string>();  // numpy.dtype
  } else {
    text = py::str(value).cast<std::string>();  // torch.float16
  }
  const std::string prefix = "torch.";
  if (text.compare(0, prefix.size(), prefix) == 0) text.erase(0, prefix.size());
  const std::optional<DType> dtype = dtype_from_name(text);
  if (!dtype) throw_invalid(where, "dtype is " + quote_name(text) + "; it must be " + allowed);
  return *dtype;
}

py::object shape_to_python(const std::vector<std::int64_t>& shape) {
  py::tuple tuple(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) tuple[i] = py::int_(shape[i]);
  return tuple;
}

std::string repr_of(const std::string& name, const py::dict& fields) {
  std::string text = name + "(";
  bool first = true;
  for (const auto& [key, value] : fields) {
    if (!first) text += ", ";
    first = false;
    text += key.cast<std::string>() + "=" + py::repr(value).cast<std::string>();
  }
  return text + ")";
}

std::string type_name(py::handle value) {
  return py::type::handle_of(value).attr("__name__").cast<std::string>();
}

}  // namespace hqq::python
