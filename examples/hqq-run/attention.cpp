#include "attention.hpp"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>

// The compiler makes a version for each of these, and the program picks one when it starts.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define FOR_EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_CPU
#endif

namespace {

constexpr std::int64_t kTile = 64;  // as many sums as registers hold

// out [width] = weights [count] * rows [count, width]: scores of keys, and the mix of values. No
// addition crosses lanes, so that the compiler may vectorize it.
FOR_EVERY_CPU void mix_rows(const float* weights, const float* rows, std::int64_t count,
                            std::int64_t width, float* out) {
  std::int64_t first = 0;
  for (; first + kTile <= width; first += kTile) {
    float sums[kTile] = {};
    for (std::int64_t r = 0; r < count; ++r) {
      const float* row = rows + r * width + first;
      for (std::int64_t i = 0; i < kTile; ++i) sums[i] += weights[r] * row[i];
    }
    std::copy_n(sums, kTile, out + first);
  }
  for (; first < width; ++first) {
    out[first] = 0;
    for (std::int64_t r = 0; r < count; ++r) out[first] += weights[r] * rows[r * width + first];
  }
}

}  // namespace

KvCache::KvCache(std::int64_t heads, std::int64_t head_dim)
    : head_dim_(head_dim), keys_(heads), values_(heads) {}

void KvCache::append(const float* keys, const float* values) {
  const std::int64_t tile = length_ / kTile * kTile * head_dim_, lane = length_ % kTile;
  for (std::size_t head = 0; head < keys_.size(); ++head, keys += head_dim_, values += head_dim_) {
    if (lane == 0) keys_[head].resize(tile + kTile * head_dim_);
    for (std::int64_t d = 0; d < head_dim_; ++d) keys_[head][tile + d * kTile + lane] = keys[d];
    values_[head].insert(values_[head].end(), values, values + head_dim_);
  }
  ++length_;
}

void KvCache::attend(const float* q, std::int64_t head, std::int64_t length,
                     std::vector<float>& scores, float* out) const {
  scores.resize(length + kTile);
  for (std::int64_t first = 0; first < length; first += kTile) {
    mix_rows(q, keys_[head].data() + first * head_dim_, head_dim_, kTile, &scores[first]);
  }
  Eigen::Map<Eigen::ArrayXf> weights(scores.data(), length);
  weights = ((weights - weights.maxCoeff()) / std::sqrt(static_cast<float>(head_dim_))).exp();
  weights /= weights.sum();
  mix_rows(scores.data(), values_[head].data(), length, head_dim_, out);
}
