// hqq_cpp.Checkpoint: an open checkpoint folder (include/hqq/checkpoint.hpp).
#include "hqq/checkpoint.hpp"
#include "python/bindings/array.hpp"
#include "python/bindings/file_path.hpp"
#include "src/base/json.hpp"

namespace hqq::python {
namespace {

constexpr const char* kCheckpointDoc =
    R"doc(A checkpoint folder or a single .safetensors file, opened and validated.

Reading is lazy: tensors are views of a memory map.

Args:
    path: Folder with model.safetensors, or with model.safetensors.index.json and its shards; or a
        file.

Raises:
    FormatError: If the index or a file breaks its format.
    OSError: If a file cannot be read.

Example:
    >>> checkpoint = hqq_cpp.Checkpoint(model)
    >>> len(checkpoint) == len(checkpoint.tensor_names)
    True
    >>> checkpoint.tensor("model.norm.weight").shape
    (256,)
    >>> checkpoint.config["model_type"]
    'llama'
)doc";

constexpr const char* kReadTensorDoc = R"doc(One tensor as it is in the file, without a copy.

Args:
    name: Its name, one of ``tensor_names``.

Returns:
    A read-only Tensor in a memory map of the file; it stays valid without the Checkpoint.

Raises:
    KeyError: If there is no such tensor.

Example:
    >>> hqq_cpp.Checkpoint(model).tensor("model.norm.weight").ndim
    1
)doc";

constexpr const char* kLayersDoc =
    R"doc(Names of the quantized layers, in file order; empty for a dense checkpoint.

Example:
    >>> hqq_cpp.Checkpoint(model).quantized_layers()
    []
)doc";

constexpr const char* kLoadDoc = R"doc(Reads one quantized layer.

Args:
    name: One of ``quantized_layers()``.
    expert: Which matrix of fused experts [E, out, in].

Raises:
    ValueError: If there is no such quantized layer or expert.
    FormatError: If its tensors do not fit the settings in config.json.

Example:
    >>> report = hqq_cpp.quantize_checkpoint(model, folder / "load-example")
    >>> hqq_cpp.Checkpoint(folder / "load-example").load("model.layers.0.mlp.down_proj").nbits
    4
)doc";

std::vector<std::string> tensor_names(const Checkpoint& checkpoint) {
  std::vector<std::string> names;
  for (std::size_t i = 0; i < checkpoint.shard_count(); ++i) {
    for (const TensorInfo& info : checkpoint.shard(i).tensors()) names.push_back(info.name);
  }
  return names;
}

Tensor read_tensor(const Checkpoint& checkpoint, const Text& name) {
  const auto [info, shard] = checkpoint.find(name);
  if (info == nullptr) throw py::key_error("[checkpoint] there is no tensor " + quote_name(name));
  return checkpoint.shard(shard).map(*info);
}

std::map<std::string, std::string> metadata(const Checkpoint& checkpoint) {
  std::map<std::string, std::string> merged;
  for (std::size_t i = 0; i < checkpoint.shard_count(); ++i) {
    const auto& one = checkpoint.shard(i).metadata();
    merged.insert(one.begin(), one.end());
  }
  return merged;
}

}  // namespace

void bind_checkpoint(py::module_& m) {
  py::class_<Checkpoint, std::shared_ptr<Checkpoint>>(m, "Checkpoint", kCheckpointDoc)
      .def(py::init([](const FilePath& path) {
             const py::gil_scoped_release release;
             return std::make_shared<Checkpoint>(path);
           }),
           py::arg("path"))
      .def_property_readonly(
          "path", [](const Checkpoint& self) { return self.path(); }, "Where it is.")
      .def_property_readonly("is_sharded", &Checkpoint::is_sharded,
                             "True if there is an index of shards.")
      .def_property_readonly("shard_names", &Checkpoint::shard_names, "File names, sorted.")
      .def_property_readonly("tensor_names", &tensor_names, "Names of all tensors, in file order.")
      .def_property_readonly("metadata", &metadata,
                             "The text entries of the files' headers; the first file wins.")
      .def_property_readonly(
          "config",
          [](const Checkpoint& self) -> OptionalDict {
            if (self.config_json().empty()) return py::none();
            // Python's own reader knows NaN and integers of any size.
            return py::module_::import("json").attr("loads")(self.config_json());
          },
          "config.json as a dict, or None if there is none.")
      .def_property_readonly("total_bytes", &Checkpoint::total_bytes, "Bytes of all tensors.")
      .def(
          "quantized_layers",
          [](const Checkpoint& self) {
            const py::gil_scoped_release release;
            return quantized_layers(self);
          },
          kLayersDoc)
      .def(
          "load",
          [](const Checkpoint& self, const Text& name, std::int64_t expert) {
            const py::gil_scoped_release release;
            return load_quantized(self, name, expert);
          },
          py::arg("name"), py::arg("expert") = 0, kLoadDoc)
      .def("tensor", &read_tensor, py::arg("name"), kReadTensorDoc)
      .def("__contains__", [](const Checkpoint& self,
                              const Text& name) { return self.find(name).first != nullptr; })
      .def("__len__", [](const Checkpoint& self) { return tensor_names(self).size(); })
      .def("__iter__",
           [](const Checkpoint& self) { return py::iter(py::cast(tensor_names(self))); })
      .def("__repr__", [](const Checkpoint& self) {
        return "Checkpoint(" + py::repr(py::cast(self.path().string())).cast<std::string>() + ", " +
               std::to_string(tensor_names(self).size()) + " tensors in " +
               std::to_string(self.shard_count()) +
               (self.shard_count() == 1 ? " file)" : " files)");
      });
}

}  // namespace hqq::python
