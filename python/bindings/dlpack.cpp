#include "python/bindings/dlpack.hpp"

#include "python/bindings/array.hpp"

namespace hqq::python {
namespace {

using dlpack::DLDataType;
using dlpack::DLTensor;

struct TypePair {
  DType dtype;
  DLDataType dl;
};

constexpr TypePair kTypes[] = {
    {DType::kBool, {dlpack::kBool, 8, 1}},
    {DType::kU8, {dlpack::kUInt, 8, 1}},
    {DType::kI8, {dlpack::kInt, 8, 1}},
    {DType::kF8E5M2, {dlpack::kFloat8E5M2, 8, 1}},
    {DType::kF8E4M3, {dlpack::kFloat8E4M3FN, 8, 1}},
    {DType::kI16, {dlpack::kInt, 16, 1}},
    {DType::kU16, {dlpack::kUInt, 16, 1}},
    {DType::kF16, {dlpack::kFloat, 16, 1}},
    {DType::kBF16, {dlpack::kBfloat, 16, 1}},
    {DType::kI32, {dlpack::kInt, 32, 1}},
    {DType::kU32, {dlpack::kUInt, 32, 1}},
    {DType::kF32, {dlpack::kFloat, 32, 1}},
    {DType::kF64, {dlpack::kFloat, 64, 1}},
    {DType::kI64, {dlpack::kInt, 64, 1}},
    {DType::kU64, {dlpack::kUInt, 64, 1}},
};

DLDataType to_dl(DType dtype) {
  for (const TypePair& pair : kTypes) {
    if (pair.dtype == dtype) return pair.dl;
  }
  throw std::logic_error("element type without a DLPack code");
}

DType from_dl(DLDataType dl, const std::string& where) {
  for (const TypePair& pair : kTypes) {
    if (pair.dl.code == dl.code && pair.dl.bits == dl.bits && dl.lanes == 1) return pair.dtype;
  }
  throw_invalid(where, "the array has a DLPack type with code " + std::to_string(dl.code) + ", " +
                           std::to_string(dl.bits) + " bits and " + std::to_string(dl.lanes) +
                           " lanes, which is not supported");
}

// What an exported capsule owns. Holds no Python object of its own, so a consumer may free it
// without the GIL.
template <class Managed>
struct Exported {
  Managed managed{};
  Tensor tensor;
  std::vector<std::int64_t> strides;

  static void free(Managed* self) { delete static_cast<Exported*>(self->manager_ctx); }
};

template <class Managed>
Managed* export_tensor(const Tensor& tensor) {
  auto exported = std::make_unique<Exported<Managed>>();
  exported->tensor = tensor;
  exported->strides.assign(tensor.shape.size(), 1);
  for (std::size_t i = tensor.shape.size(); i-- > 1;) {
    exported->strides[i - 1] = exported->strides[i] * tensor.shape[i];
  }
  DLTensor& dl = exported->managed.dl_tensor;
  dl.data = exported->tensor.buffer.data;
  dl.device = {dlpack::kCpu, 0};
  dl.ndim = static_cast<std::int32_t>(tensor.shape.size());
  dl.dtype = to_dl(tensor.dtype);
  dl.shape = exported->tensor.shape.data();
  dl.strides = exported->strides.data();
  exported->managed.manager_ctx = exported.get();
  exported->managed.deleter = &Exported<Managed>::free;
  return &exported.release()->managed;
}

// Frees a capsule that nobody has taken over: consumers rename the ones they take.
template <class Managed>
void free_capsule(PyObject* capsule, const char* name) {
  if (PyCapsule_IsValid(capsule, name) == 0) return;
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
  if (managed->deleter != nullptr) managed->deleter(managed);
}

template <class Managed>
ArrayView take_capsule(const py::object& capsule, const char* name, const char* used_name,
                       const std::string& where) {
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (managed == nullptr) throw py::error_already_set();
  if constexpr (std::is_same_v<Managed, dlpack::DLManagedTensorVersioned>) {
    // Another major version may lay the struct out differently; the capsule stays unused.
    if (managed->version.major > dlpack::kMajor) {
      throw_invalid(where, "the array comes as DLPack version " +
                               std::to_string(managed->version.major) + "; up to 1 is supported");
    }
  }
  if (PyCapsule_SetName(capsule.ptr(), used_name) != 0) throw py::error_already_set();
  ArrayView view;
  view.owner = std::shared_ptr<void>(managed, [](void* pointer) {
    auto* self = static_cast<Managed*>(pointer);
    if (self->deleter == nullptr || Py_IsInitialized() == 0) return;
    // The producer's deleter may touch Python objects.
    const py::gil_scoped_acquire gil;
    self->deleter(self);
  });
  const DLTensor& dl = managed->dl_tensor;
  view.dtype = from_dl(dl.dtype, where);
  view.data = static_cast<const std::byte*>(dl.data) + dl.byte_offset;
  view.shape.assign(dl.shape, dl.shape + dl.ndim);
  view.strides.resize(view.shape.size());
  if (dl.data == nullptr && checked_numel(view.shape, where) > 0) {
    throw_invalid(where, "the array of shape " + shape_string(view.shape) + " has no memory");
  }
  const auto size = static_cast<std::int64_t>(dtype_size(view.dtype));
  std::int64_t row_major = 1;
  for (std::size_t i = view.shape.size(); i-- > 0;) {
    view.strides[i] = (dl.strides != nullptr ? dl.strides[i] : row_major) * size;
    row_major *= view.shape[i];
  }
  return view;
}

}  // namespace

py::capsule dlpack_export(const Tensor& tensor, bool versioned) {
  using Versioned = dlpack::DLManagedTensorVersioned;
  using Plain = dlpack::DLManagedTensor;
  PyObject* capsule = nullptr;
  if (versioned) {
    Versioned* managed = export_tensor<Versioned>(tensor);
    managed->version = {dlpack::kMajor, dlpack::kMinor};
    managed->flags = dlpack::kFlagReadOnly;
    capsule = PyCapsule_New(managed, dlpack::kVersionedName, [](PyObject* self) {
      free_capsule<Versioned>(self, dlpack::kVersionedName);
    });
    if (capsule == nullptr) managed->deleter(managed);
  } else {
    Plain* managed = export_tensor<Plain>(tensor);
    capsule = PyCapsule_New(managed, dlpack::kName,
                            [](PyObject* self) { free_capsule<Plain>(self, dlpack::kName); });
    if (capsule == nullptr) managed->deleter(managed);
  }
  if (capsule == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::capsule>(capsule);
}

ArrayView dlpack_import(py::handle object, const std::string& where) {
  py::object source = py::reinterpret_borrow<py::object>(object);
  // torch refuses to export what requires grad; the values are all that is wanted here.
  if (py::hasattr(source, "requires_grad") && py::hasattr(source, "detach") &&
      source.attr("requires_grad").cast<bool>()) {
    source = source.attr("detach")();
  }
  std::int32_t device = dlpack::kCpu;
  try {
    const auto pair = source.attr("__dlpack_device__")().cast<py::tuple>();
    device = py::int_(pair[0]).cast<std::int32_t>();
  } catch (py::error_already_set& error) {
    // torch has no DLPack device for tensors without memory ("meta").
    if (!error.matches(PyExc_ValueError)) throw;
    throw_invalid(where,
                  "the array is not in CPU memory: " + py::str(error.value()).cast<std::string>());
  }
  if (device != dlpack::kCpu && device != dlpack::kCudaHost) {
    std::string text = "DLPack device type " + std::to_string(device);
    if (py::hasattr(source, "device")) {
      text = py::str(source.attr("device")).cast<std::string>();
    }
    throw_invalid(where, "the array is on the device " + text +
                             "; it must be in CPU memory (in torch: tensor.cpu())");
  }
  py::object capsule;
  try {
    capsule = source.attr("__dlpack__")(py::arg("max_version") =
                                            py::make_tuple(dlpack::kMajor, dlpack::kMinor));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    capsule = source.attr("__dlpack__")();  // a producer older than DLPack 1.0
  }
  if (PyCapsule_IsValid(capsule.ptr(), dlpack::kVersionedName) != 0) {
    return take_capsule<dlpack::DLManagedTensorVersioned>(capsule, dlpack::kVersionedName,
                                                          dlpack::kUsedVersionedName, where);
  }
  return take_capsule<dlpack::DLManagedTensor>(capsule, dlpack::kName, dlpack::kUsedName, where);
}

}  // namespace hqq::python
