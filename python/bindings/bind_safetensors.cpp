// load_safetensors and save_safetensors: include/hqq/safetensors.hpp. Docstrings in
// hqq_cpp/checkpoints.py.
#include "hqq/safetensors.hpp"
#include "python/bindings/array.hpp"
#include "python/bindings/file_path.hpp"

namespace hqq::python {
namespace {

py::typing::Dict<py::str, Tensor> load(const FilePath& path) {
  std::vector<std::pair<std::string, Tensor>> tensors;
  {
    const py::gil_scoped_release release;
    const SafetensorsFile file(path);
    for (const TensorInfo& info : file.tensors()) tensors.emplace_back(info.name, file.map(info));
  }
  py::dict dict;
  for (auto& [name, tensor] : tensors) dict[py::str(name)] = std::move(tensor);
  return dict;
}

std::map<std::string, std::string> read_metadata(const FilePath& path) {
  const py::gil_scoped_release release;
  return SafetensorsFile(path).metadata();
}

void save(const FilePath& path, const py::dict& tensors, const std::map<Text, Text>& metadata) {
  std::vector<std::pair<std::string, Tensor>> owned;
  for (const auto& [key, value] : tensors) {
    if (!py::isinstance<py::str>(key)) {
      throw_invalid("safetensors", "a tensor name must be a string, not " + type_name(key));
    }
    const std::string name = utf8_of(key);
    owned.emplace_back(name, tensor_from_python(value, "safetensors, " + name));
  }
  std::vector<std::pair<std::string, const Tensor*>> pointers;
  for (const auto& [name, tensor] : owned) pointers.emplace_back(name, &tensor);
  const py::gil_scoped_release release;
  save_safetensors(path, pointers, {metadata.begin(), metadata.end()});
}

}  // namespace

void bind_safetensors(py::module_& m) {
  m.def("load_safetensors", &load, py::arg("path"), "See hqq_cpp.load_safetensors.");
  m.def("safetensors_metadata", &read_metadata, py::arg("path"),
        "See hqq_cpp.safetensors_metadata.");
  m.def("save_safetensors", &save, py::arg("path"), py::arg("tensors"), py::arg("metadata"),
        "See hqq_cpp.save_safetensors.");
}

}  // namespace hqq::python
