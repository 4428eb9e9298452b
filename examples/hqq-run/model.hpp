// The forward pass of Llama and Qwen3 models.
#pragma once

#include <functional>

#include "attention.hpp"
#include "config.hpp"
#include "weights.hpp"

// What a model keeps of the tokens it has seen.
struct Context {
  std::int64_t length = 0;
  std::vector<KvCache> layers;
};

class Model {
 public:
  // Called with the input of every linear layer.
  using Observer = std::function<void(const std::string& layer, const Matrix& x)>;

  // lm_head_bits: of a float lm_head. 0: it stays float; -1: 8 if other layers are quantized.
  Model(const std::filesystem::path& folder, const hqq::LinearOptions& options, int lm_head_bits);

  const Config& config() const { return config_; }
  void set_observer(Observer observer) { observer_ = std::move(observer); }

  // Appends tokens to the context. Returns their last hidden states [tokens, hidden_size]. Throws
  // std::invalid_argument for a token that the model does not have.
  Matrix forward(const Tokens& tokens, Context& context) const;
  // Logits [rows, vocab_size] of the tokens that follow.
  Matrix logits(const Matrix& hidden) const { return apply({&lm_head_}, hidden).front(); }

 private:
  struct Layer {
    std::vector<float> input_norm, post_attention_norm, q_norm, k_norm;
    Linear q, k, v, o, gate, up, down;
  };

  std::vector<Matrix> apply(const std::vector<const Linear*>& layers, const Matrix& x) const;
  // Norm (empty: none) and rotary position embedding of every head [head_dim] in the rows of x.
  void turn_heads(Matrix& x, const std::vector<float>& norm, std::int64_t position) const;
  Matrix attention(const Layer& layer, const Matrix& x, std::int64_t position,
                   KvCache& cache) const;

  Config config_;
  hqq::LinearOptions options_;
  Linear embedding_, lm_head_;
  std::vector<Layer> layers_;
  std::vector<float> norm_;
  Observer observer_;
};
