// The calls that docs/cpp.md explains, one section each.
//
//   library_tour SOURCE FOLDER    reads the checkpoint folder SOURCE and replaces FOLDER
#include <hqq/hqq.hpp>
#include <iostream>
#include <string>
#include <vector>

namespace {

hqq::QuantizedTensor quantize_a_matrix() {
  std::vector<float> weights(512 * 1024);
  for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<float>(i % 37) - 18;
  const hqq::TensorView W(weights.data(), hqq::DType::kF32, 512, 1024);  // [out, in]

  hqq::LayerConfig settings;
  settings.nbits = hqq::BitWidth::k3;
  settings.group_size = 64;

  hqq::QuantizeStats stats;
  hqq::QuantizeOptions options;
  options.stats = &stats;
  const hqq::Quantizer quantizer{hqq::HqqConfig(settings)};
  hqq::QuantizedTensor q = quantizer.quantize(W, "model.layers.0.mlp.up_proj", options);
  std::cout << q.bits_per_weight() << " bits per weight, rms error " << stats.rms_error << "\n";
  return q;
}

void own_tensors(const hqq::QuantizedTensor& q) {
  const hqq::Tensor W_r = hqq::dequantize(q);  // float32 [512, 1024], new memory
  const float* row = W_r.data<float>() + 3 * 1024;

  std::vector<float> mine(512 * 1024);
  hqq::dequantize(q, mine.data());  // into memory of the caller
  std::cout << "W_r[3, 0] is " << row[0] << " and " << mine[3 * 1024] << "\n";
}

void multiply(hqq::QuantizedTensor q) {
  const hqq::Linear layer(std::move(q));

  const std::vector<float> values(2 * 1024, 1.0F);
  const hqq::TensorView x(values.data(), hqq::DType::kF32, 2, 1024);
  std::vector<float> y(2 * 512);
  layer(x, y.data());

  hqq::LinearOptions options;
  options.mode = hqq::LinearMode::kExact;  // the default, kFast, rounds x to int8
  layer(x, y.data(), options);

  const std::vector<std::int64_t> tokens = {17, 4};
  std::vector<float> rows(2 * 1024);  // of W_r, as an embedding needs them
  layer.rows(tokens, hqq::DType::kF32, rows.data());
  std::cout << "y[0, 0] is " << y[0] << "\n";
}

void read_folders(const std::string& source, const std::string& folder) {
  hqq::QuantizeCheckpointOptions options;
  options.force = true;  // replaces an existing folder
  hqq::quantize_checkpoint(source, folder, hqq::HqqConfig(), options);

  const hqq::Checkpoint checkpoint(folder);
  for (const std::string& name : hqq::quantized_layers(checkpoint)) {
    const hqq::QuantizedTensor q = hqq::load_quantized(checkpoint, name);
    std::cout << name << ": " << q.bits_per_weight() << " bits per weight\n";
  }
  const auto [info, shard] = checkpoint.find("model.norm.weight");
  if (info != nullptr) {
    const hqq::Tensor norm = checkpoint.shard(shard).map(*info);  // a view of the mapped file
    std::cout << info->name << ": " << hqq::shape_string(norm.shape) << "\n";
  }
}

void catch_errors() {
  hqq::LayerConfig settings;
  settings.group_size = 12;
  try {
    hqq::Quantizer{hqq::HqqConfig(settings)};
  } catch (const std::invalid_argument& error) {
    std::cout << error.what() << "\n";  // [config] group_size is 12; it must be a multiple of 8 ...
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "the arguments must be SOURCE FOLDER\n";
    return 2;
  }
  const hqq::QuantizedTensor q = quantize_a_matrix();
  own_tensors(q);
  multiply(q);
  read_folders(argv[1], argv[2]);
  catch_errors();
}
