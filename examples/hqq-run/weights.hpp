// The weights of a checkpoint folder, quantized or float, and products with them.
#pragma once

#include <hqq/eigen.hpp>
#include <hqq/hqq.hpp>
#include <set>
#include <span>
#include <string>
#include <vector>

using Matrix = hqq::RowMajorMatrix;

// A linear layer with a matrix W [out, in].
struct Linear {
  std::string name;
  std::int64_t out = 0, in = 0;
  hqq::Tensor dense;  // W as it lies in the mapped file, if it is not quantized
  hqq::TiledTensor quantized;
  std::vector<float> bias;  // or empty

  // x W^T + bias for the rows of x, if W is not quantized.
  Matrix dense_product(const Matrix& x) const;
  // Rows of W, as an embedding takes them.
  Matrix rows(std::span<const std::int64_t> indices) const;
};

// Products of x with several layers, quantized ones side by side.
std::vector<Matrix> multiply(std::span<const Linear* const> layers, const Matrix& x,
                             const hqq::LinearOptions& options);

// Functions throw hqq::FormatError for weights that are missing or of another shape.
class Weights {
 public:
  explicit Weights(const std::filesystem::path& folder);
  bool has_quantized_layers() const { return !quantized_.empty(); }
  std::vector<float> vector(const std::string& name, std::int64_t size) const;
  // A layer [out, in]. A float one is quantized to `bits`, if they are not 0.
  Linear linear(const std::string& name, std::int64_t out, std::int64_t in, int bits = 0) const;

 private:
  hqq::Tensor tensor(const std::string& name, const std::vector<std::int64_t>& shape) const;
  hqq::Checkpoint checkpoint_;
  std::set<std::string> quantized_;
};
