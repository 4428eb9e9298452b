// Quantizes and multiplies with pointers, with no header of Eigen or nlohmann/json in reach.
#include <cmath>
#include <cstdio>
#include <hqq/hqq.hpp>
#include <vector>

int main() {
  constexpr int kOut = 48, kIn = 256;
  std::vector<float> W(kOut * kIn), x(kIn, 1.0f), y(kOut);
  for (std::size_t i = 0; i < W.size(); ++i) W[i] = std::sin(0.37f * static_cast<float>(i));

  const hqq::HqqConfig config = hqq::HqqConfig::from_json_text(R"({"nbits": 8})");
  const hqq::TensorView view(W.data(), hqq::DType::kF32, kOut, kIn);
  const hqq::TiledTensor q = hqq::tile(hqq::Quantizer(config).quantize(view));
  hqq::linear(hqq::TensorView(x.data(), hqq::DType::kF32, 1, kIn), q, {}, y.data(),
              {hqq::LinearMode::kExact});
  for (int row = 0; row < kOut; ++row) {
    float sum = 0;
    for (int col = 0; col < kIn; ++col) sum += W[static_cast<std::size_t>(row * kIn + col)];
    // 8 bits leave at most half a step of 1/128 in each of 256 weights.
    if (std::abs(sum - y[static_cast<std::size_t>(row)]) > 0.5f) {
      std::printf("row %d: %f, not %f\n", row, y[static_cast<std::size_t>(row)], sum);
      return 1;
    }
  }
  std::printf("settings: %s\n", config.to_json_text().c_str());
  return 0;
}
