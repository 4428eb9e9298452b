#include "src/cuda/device_weight.hpp"

#include <vector>

#include "src/format/float_values.hpp"

namespace hqq::cuda {
namespace {

void copy_bytes(void* to, const void* from, std::size_t bytes) {
  check(library().copy(to, from, bytes, nullptr), "linear");
}

}  // namespace

DeviceWeight::DeviceWeight(const QuantizedTensor& q, std::span<const float> bias, int device)
    : device_(device), description_(describe_matrix(q.config, q.out_features, q.in_features)) {
  const Layer format1(q.config, q.out_features, q.in_features, Packing::kFormat1);
  const std::optional<std::size_t> tiles = format1.tiles_bytes(device);
  const CurrentDevice current(device);
  place_tensors(tiles.value_or(q.W_q.nbytes()), bias.size() * sizeof(std::uint16_t));
  matrix_ =
      device_matrix(description_, addresses_, tiles ? Packing::kCudaTiles : Packing::kFormat1);
  upload_codes(q);
  upload_metadata(q);
  upload_bias(bias, DType::kF16, bias_f16_);
  upload_bias(bias, DType::kBF16, bias_bf16_);
  check(library().synchronize(nullptr), "linear");
}

void DeviceWeight::place_tensors(std::size_t codes_bytes, std::size_t bias_bytes) {
  // Offsets first, then addresses.
  Places places;
  std::array<std::size_t, std::tuple_size_v<TensorAddresses>> offsets{};
  const auto fields = description_.fields();
  for (std::size_t i = 0; i < fields.size(); ++i) {
    const Tensor& tensor = *fields[i].second;
    if (tensor) offsets[i] = places.add(i == 0 ? codes_bytes : tensor.nbytes());
  }
  const std::size_t f16 = places.add(bias_bytes), bf16 = places.add(bias_bytes);
  std::byte* base = memory_.reserve(places.size, "linear on cuda:" + std::to_string(device_));
  for (std::size_t i = 0; i < fields.size(); ++i) {
    if (*fields[i].second) addresses_[i] = reinterpret_cast<std::uintptr_t>(base + offsets[i]);
  }
  if (bias_bytes == 0) return;
  bias_f16_ = base + f16;
  bias_bf16_ = base + bf16;
}

void DeviceWeight::upload_codes(const QuantizedTensor& q) const {
  if (!is_packed()) return copy_bytes(matrix_.W_q, q.W_q.buffer.data, q.W_q.nbytes());
  DeviceMemory codes;
  codes.reserve(q.W_q.nbytes(), "packing on cuda:" + std::to_string(device_));
  copy_bytes(codes.data(), q.W_q.buffer.data, q.W_q.nbytes());
  DeviceMatrix format1 = matrix_;
  format1.packing = Packing::kFormat1;
  format1.W_q = reinterpret_cast<std::uint8_t*>(codes.data());
  check(library().pack(format1, matrix_.W_q, nullptr), "pack");
  check(library().synchronize(nullptr), "pack");
}

void DeviceWeight::upload_metadata(const QuantizedTensor& q) const {
  const auto fields = q.fields();
  for (std::size_t i = 1; i < fields.size(); ++i) {
    const Tensor& tensor = *fields[i].second;
    if (tensor)
      copy_bytes(reinterpret_cast<void*>(addresses_[i]), tensor.buffer.data, tensor.nbytes());
  }
}

void DeviceWeight::upload_bias(std::span<const float> bias, DType type, std::byte* to) const {
  if (to == nullptr) return;
  std::vector<std::byte> values(bias.size() * sizeof(std::uint16_t));
  write_values(bias, type, values.data());
  copy_bytes(to, values.data(), values.size());
  // The copy may still read the values.
  check(library().synchronize(nullptr), "linear");
}

LinearOutcome DeviceWeight::linear(const TensorView& x, void* y, StreamHandle stream) const {
  LinearArgs args;
  args.weight = matrix_;
  args.x_type = x.dtype;
  args.x = x.data;
  args.rows = x.rows;
  args.x_stride = x.row_stride;
  args.bias = x.dtype == DType::kF16 ? bias_f16_ : bias_bf16_;
  args.y = y;
  args.y_stride = matrix_.layout.rows;
  return cuda::linear(args, {device_, stream});
}

QuantizedTensor DeviceWeight::download() const {
  QuantizedTensor q;
  q.config = description_.config;
  q.out_features = description_.out_features;
  q.in_features = description_.in_features;
  q.allocate();
  const CurrentDevice current(device_);
  const auto fields = q.fields();
  DeviceMemory codes;
  for (std::size_t i = 0; i < fields.size(); ++i) {
    Tensor& tensor = *fields[i].second;
    if (!tensor) continue;
    const void* from = reinterpret_cast<const void*>(addresses_[i]);
    if (i == 0 && is_packed()) {
      auto* W_q = reinterpret_cast<std::uint8_t*>(
          codes.reserve(tensor.nbytes(), "unpacking on cuda:" + std::to_string(device_)));
      check(library().unpack(matrix_, W_q, matrix_.row_bytes, nullptr), "unpack");
      from = W_q;
    }
    copy_bytes(tensor.buffer.data, from, tensor.nbytes());
  }
  check(library().synchronize(nullptr), "linear");
  return q;
}

}  // namespace hqq::cuda
