// Attention of a token to all tokens so far, whose keys and values are kept.
#pragma once

#include <cstdint>
#include <vector>

// Keys and values of one layer, in the order in which attention reads them.
class KvCache {
 public:
  KvCache(std::int64_t heads, std::int64_t head_dim);

  // Appends keys and values [heads, head_dim] of a token.
  void append(const float* keys, const float* values);
  // out [head_dim] = softmax(q k^T / sqrt(head_dim)) v over the first `length` tokens. out may be
  // q, and `scores` is scratch.
  void attend(const float* q, std::int64_t head, std::int64_t length, std::vector<float>& scores,
              float* out) const;

 private:
  std::int64_t head_dim_, length_ = 0;
  std::vector<std::vector<float>> keys_;  // of each head: [tiles of kTile tokens, head_dim, kTile]
  std::vector<std::vector<float>> values_;  // of each head: [tokens, head_dim]
};
