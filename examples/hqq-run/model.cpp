#include "model.hpp"

#include <cmath>

namespace {
using Eigen::ArrayXf;

// x / sqrt(mean(x^2) + eps) * weight, in place.
void normalize(float* x, const std::vector<float>& weight, float eps) {
  Eigen::Map<ArrayXf> values(x, weight.size());
  const Eigen::Map<const ArrayXf> scale(weight.data(), weight.size());
  values *= scale / std::sqrt(values.square().mean() + eps);
}

Matrix normalized_rows(Matrix x, const std::vector<float>& weight, float eps) {
  for (std::int64_t row = 0; row < x.rows(); ++row) normalize(x.row(row).data(), weight, eps);
  return x;
}

}  // namespace

Model::Model(const std::filesystem::path& folder, const hqq::LinearOptions& options,
             int lm_head_bits)
    : config_(Config::load(folder)), options_(options) {
  Eigen::setNbThreads(options.threads);
  const Weights weights(folder);
  const std::int64_t hidden = config_.hidden_size, inner = config_.intermediate_size;
  const std::int64_t size = config_.head_dim, q = config_.num_attention_heads * size;
  const std::int64_t kv = config_.num_key_value_heads * size;
  for (std::int64_t i = 0; i < config_.num_hidden_layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
    Layer layer;
    layer.input_norm = weights.vector(prefix + "input_layernorm.weight", hidden);
    layer.post_attention_norm = weights.vector(prefix + "post_attention_layernorm.weight", hidden);
    if (config_.has_head_norms) {
      layer.q_norm = weights.vector(attention + "q_norm.weight", size);
      layer.k_norm = weights.vector(attention + "k_norm.weight", size);
    }
    layer.q = weights.linear(attention + "q_proj", q, hidden);
    layer.k = weights.linear(attention + "k_proj", kv, hidden);
    layer.v = weights.linear(attention + "v_proj", kv, hidden);
    layer.o = weights.linear(attention + "o_proj", hidden, q);
    layer.gate = weights.linear(mlp + "gate_proj", inner, hidden);
    layer.up = weights.linear(mlp + "up_proj", inner, hidden);
    layer.down = weights.linear(mlp + "down_proj", hidden, inner);
    layers_.push_back(std::move(layer));
  }
  norm_ = weights.vector("model.norm.weight", hidden);
  embedding_ = weights.linear("model.embed_tokens", config_.vocab_size, hidden);
  // A tied lm_head is the embedding, but its products are faster with a quantized copy.
  const bool tied = config_.tie_word_embeddings;
  if (lm_head_bits < 0) lm_head_bits = weights.has_quantized_layers() ? 8 : 0;
  lm_head_ =
      weights.linear(tied ? embedding_.name : "lm_head", config_.vocab_size, hidden, lm_head_bits);
}

std::vector<Matrix> Model::apply(const std::vector<const Linear*>& layers, const Matrix& x) const {
  for (const Linear* layer : layers) {
    if (observer_) observer_(layer->name, x);
  }
  return multiply(layers, x, options_);
}

void Model::turn_heads(Matrix& x, const std::vector<float>& norm, std::int64_t position) const {
  const std::int64_t size = config_.head_dim;
  const Eigen::Map<const ArrayXf> frequencies(config_.frequencies.data(), size / 2);
  for (std::int64_t t = 0; t < x.rows(); ++t) {
    const ArrayXf angles = frequencies * static_cast<float>(position + t);
    const ArrayXf cos = angles.cos(), sin = angles.sin();
    for (float* head = x.row(t).data(); head < x.row(t).data() + x.cols(); head += size) {
      if (!norm.empty()) normalize(head, norm, config_.rms_norm_eps);
      // The two halves of a head are the coordinates of its planes.
      Eigen::Map<ArrayXf> a(head, size / 2), b(head + size / 2, size / 2);
      const ArrayXf turned = a * cos - b * sin;
      b = b * cos + a * sin;
      a = turned;
    }
  }
}

Matrix Model::attention(const Layer& layer, const Matrix& x, std::int64_t position,
                        KvCache& cache) const {
  std::vector<Matrix> qkv = apply({&layer.q, &layer.k, &layer.v}, x);
  Matrix &q = qkv[0], &k = qkv[1], &v = qkv[2];
  turn_heads(q, layer.q_norm, position);
  turn_heads(k, layer.k_norm, position);
  const std::int64_t tokens = x.rows(), size = config_.head_dim;
  for (std::int64_t t = 0; t < tokens; ++t) cache.append(&k(t, 0), &v(t, 0));
  const std::int64_t heads = config_.num_attention_heads;
  const std::int64_t shared = heads / config_.num_key_value_heads;  // by several heads of q
  // With few tokens, threads cost more than they give.
#pragma omp parallel num_threads(options_.threads) if (tokens * (position + tokens) > 256)
  {
    std::vector<float> scores;
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < tokens * heads; ++i) {
      const std::int64_t t = i / heads, h = i % heads;
      float* head = &q(t, h * size);
      cache.attend(head, h / shared, position + t + 1, scores, head);
    }
  }
  return std::move(apply({&layer.o}, q).front());
}

Matrix Model::forward(const Tokens& tokens, Context& context) const {
  if (context.layers.empty()) {
    context.layers.resize(layers_.size(), KvCache(config_.num_key_value_heads, config_.head_dim));
  }
  const std::int64_t length = context.length + std::ssize(tokens);
  if (length > config_.max_position_embeddings) {
    hqq::throw_invalid("model", std::to_string(length) + " tokens are more than its " +
                                    std::to_string(config_.max_position_embeddings) +
                                    " positions (max_position_embeddings)");
  }
  const float eps = config_.rms_norm_eps;
  Matrix x = embedding_.rows(tokens);
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const Matrix h = normalized_rows(x, layer.input_norm, eps);
    x += attention(layer, h, context.length, context.layers[i]);
    const Matrix g = normalized_rows(x, layer.post_attention_norm, eps);
    const std::vector<Matrix> inner = apply({&layer.gate, &layer.up}, g);
    const auto gate = inner[0].array(), up = inner[1].array();
    x += apply({&layer.down}, gate / (1 + (-gate).exp()) * up).front();
  }
  context.length = length;
  return normalized_rows(std::move(x), norm_, eps);
}
