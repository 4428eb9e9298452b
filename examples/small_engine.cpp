// A small engine: quantizes the checkpoint folder SOURCE of a Llama into FOLDER, opens FOLDER and
// runs the embedding and the MLP blocks of the model from packed codes.
//
//   small_engine SOURCE FOLDER
#include <cmath>
#include <filesystem>
#include <hqq/hqq.hpp>
#include <iostream>
#include <numeric>
#include <string>
#include <vector>

hqq::Linear load(const hqq::Checkpoint& checkpoint, const std::string& name) {
  return hqq::Linear(hqq::load_quantized(checkpoint, name));
}

hqq::TensorView view(const std::vector<float>& x, std::int64_t cols) {
  return {x.data(), hqq::DType::kF32, std::ssize(x) / cols, cols};
}

struct Mlp {
  hqq::Linear gate, up, down;

  // down(silu(gate(x)) * up(x)); x and the result are float32 [tokens, hidden size].
  std::vector<float> operator()(const std::vector<float>& x) const {
    const hqq::TensorView rows = view(x, gate.in_features());
    std::vector<float> g(rows.rows * gate.out_features()), u(g.size()), y(x.size());
    gate(rows, g.data());
    up(rows, u.data());
    for (std::size_t i = 0; i < g.size(); ++i) g[i] *= u[i] / (1 + std::exp(-g[i]));
    down(view(g, down.in_features()), y.data());
    return y;
  }
};

int main(int argc, char** argv) try {
  if (argc != 3) hqq::throw_invalid("small_engine", "the arguments must be SOURCE FOLDER");
  const std::filesystem::path source = argv[1], folder = argv[2];

  hqq::HqqConfig config;  // 4 bits; an embedding is quantized only where a rule names it
  hqq::LayerConfig eight_bits;
  eight_bits.nbits = hqq::BitWidth::k8;
  config.dynamic_config = {{"embed_tokens", eight_bits}};
  hqq::QuantizeCheckpointOptions options;
  options.force = true;  // replaces FOLDER
  hqq::quantize_checkpoint(source, folder, config, options);

  const hqq::Checkpoint checkpoint(folder);
  std::vector<Mlp> blocks;
  for (const std::string& name : hqq::quantized_layers(checkpoint)) {
    if (!name.ends_with(".gate_proj")) continue;
    const std::string mlp = name.substr(0, name.rfind('.'));
    blocks.push_back({load(checkpoint, name), load(checkpoint, mlp + ".up_proj"),
                      load(checkpoint, mlp + ".down_proj")});
  }

  const hqq::Linear embedding = load(checkpoint, "model.embed_tokens");
  const std::vector<std::int64_t> tokens = {17, 4, 1999};
  std::vector<float> x(tokens.size() * embedding.in_features());
  embedding.rows(tokens, hqq::DType::kF32, x.data());
  for (const Mlp& block : blocks) {
    const std::vector<float> y = block(x);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }
  const float norm = std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0F));
  std::cout << blocks.size() << " blocks, " << tokens.size() << " tokens, norm " << norm << "\n";
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 2;
}
