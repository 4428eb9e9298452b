#include "src/cuda/layer.hpp"

#include "src/cuda/handles.hpp"
#include "src/format/tensor_specs.hpp"

namespace hqq::cuda {
namespace {

// False for kUnsupported; throws for every other failure.
bool is_supported(Status status, const char* what) {
  if (status == Status::kUnsupported) return false;
  check(status, what);
  return true;
}

}  // namespace

QuantizedTensor describe_matrix(const LayerConfig& config, std::int64_t out_features,
                                std::int64_t in_features) {
  QuantizedTensor q;
  q.config = config;
  q.out_features = out_features;
  q.in_features = in_features;
  describe_tensors(q, tensor_specs(config, out_features, in_features));
  return q;
}

DeviceMatrix device_matrix(const QuantizedTensor& q, const TensorAddresses& addresses,
                           Packing packing) {
  static_assert(kTensorNames.size() == 8, "DeviceMatrix must have a field for every tensor");
  const auto at = [&](std::size_t i) { return reinterpret_cast<void*>(addresses[i]); };
  DeviceMatrix matrix;
  matrix.layout = q.layout();
  matrix.width = q.config.nbits;
  matrix.packing = packing;
  matrix.W_q = static_cast<std::uint8_t*>(at(0));
  matrix.row_bytes = packed_row_bytes(q.config.nbits, q.in_features);
  matrix.scale_type = q.scale.dtype;
  matrix.zero_type = q.zero.dtype;
  matrix.scale = at(1);
  matrix.zero = at(2);
  matrix.scale_step = static_cast<float*>(at(3));
  matrix.scale_offset = static_cast<float*>(at(4));
  matrix.zero_step = static_cast<float*>(at(5));
  matrix.zero_offset = static_cast<float*>(at(6));
  matrix.col_scale_type = q.config.meta_dtype;
  matrix.col_scale = at(7);
  return matrix;
}

Layer::Layer(const LayerConfig& config, std::int64_t out_features, std::int64_t in_features,
             Packing packing)
    : description_(describe_matrix(config, out_features, in_features)), packing_(packing) {
  description_.validate("layer");
}

std::optional<std::size_t> Layer::tiles_bytes(int device) const {
  const CurrentDevice current(device);
  std::size_t bytes = 0;
  const Status status = library().tiles_bytes(matrix({}), &bytes);
  return is_supported(status, "linear") ? std::optional(bytes) : std::nullopt;
}

std::optional<std::int64_t> Layer::max_rows(DType x_type, int device) const {
  const CurrentDevice current(device);
  std::int64_t rows = 0;
  const Status status = library().max_rows(matrix({}), x_type, &rows);
  return is_supported(status, "linear") ? std::optional(rows) : std::nullopt;
}

void Layer::pack(const TensorAddresses& addresses, void* tiles, const Place& place) const {
  const CurrentDevice current(place.device);
  check(library().pack(matrix(addresses), tiles, place.stream), "pack");
  check(library().synchronize(place.stream), "pack");
}

void Layer::unpack(const TensorAddresses& addresses, std::uint8_t* W_q, const Place& place) const {
  const CurrentDevice current(place.device);
  const DeviceMatrix from = matrix(addresses);
  check(library().unpack(from, W_q, from.row_bytes, place.stream), "unpack");
  check(library().synchronize(place.stream), "unpack");
}

void dequantize(const DeviceMatrix& matrix, void* out, DType type, const Place& place) {
  const CurrentDevice current(place.device);
  check(library().dequantize(matrix, out, type, place.stream), "dequantize");
}

void dequantize_rows(const DeviceMatrix& matrix, const std::int64_t* ids, std::int64_t count,
                     void* out, DType type, const Place& place) {
  const CurrentDevice current(place.device);
  check(library().dequantize_rows(matrix, ids, count, out, type, place.stream), "embedding");
}

bool is_recording(StreamHandle stream) {
  // The default stream of a device cannot record.
  if (stream == nullptr) return false;
  bool recording = false;
  check(library().is_capturing(stream, &recording), "is_capturing");
  return recording;
}

}  // namespace hqq::cuda
