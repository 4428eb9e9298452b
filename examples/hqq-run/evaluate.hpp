// Perplexity of a text, and importance: the mean squares of the inputs of linear layers.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>

#include "model.hpp"

// exp(mean cross entropy) over the first `windows` windows of `window` tokens, or all that
// there are. Every window starts anew, and its first token is not predicted.
inline double perplexity(const Model& model, const Tokens& tokens, std::int64_t window,
                         std::int64_t windows) {
  windows = std::min(windows, std::ssize(tokens) / window);
  if (windows == 0) {
    hqq::throw_invalid("perplexity", "the text has " + std::to_string(tokens.size()) +
                                         " tokens; a window has " + std::to_string(window));
  }
  double loss = 0;
  for (std::int64_t i = 0; i < windows; ++i) {
    const std::int64_t* piece = &tokens[i * window];
    Context context;
    const Matrix logits = model.logits(model.forward({piece, piece + window}, context));
    for (std::int64_t t = 0; t + 1 < window; ++t) {
      const Eigen::ArrayXd row = logits.row(t).cast<double>();
      loss += row.maxCoeff() + std::log((row - row.maxCoeff()).exp().sum()) - row[piece[t + 1]];
    }
  }
  if (!std::isfinite(loss)) {
    hqq::throw_invalid("model", "its logits are no finite numbers, so there is no perplexity");
  }
  return std::exp(loss / static_cast<double>(windows * (window - 1)));
}

// Layer -> float32 [in], what hqq-cpp quantize --importance reads (docs/format.md).
inline std::map<std::string, hqq::Tensor> importance(Model& model, const Tokens& tokens) {
  const std::int64_t window = std::min<std::int64_t>(512, model.config().max_position_embeddings);
  std::map<std::string, Eigen::ArrayXd> sums;
  model.set_observer([&](const std::string& layer, const Matrix& x) {
    Eigen::ArrayXd& sum = sums.try_emplace(layer, Eigen::ArrayXd::Zero(x.cols())).first->second;
    sum += x.cast<double>().colwise().squaredNorm().transpose().array();
  });
  for (std::int64_t first = 0; first < std::ssize(tokens); first += window) {
    const std::int64_t count = std::min(window, std::ssize(tokens) - first);
    Context context;
    const Matrix hidden = model.forward({&tokens[first], &tokens[first] + count}, context);
    if (!model.config().tie_word_embeddings) model.logits(hidden);  // else it is not quantized
  }
  model.set_observer({});
  std::map<std::string, hqq::Tensor> means;
  for (const auto& [layer, sum] : sums) {
    if (!sum.isFinite().all()) {
      hqq::throw_invalid("model", "inputs of " + layer + " are no finite numbers");
    }
    hqq::Tensor mean = hqq::Tensor::allocate(hqq::DType::kF32, {sum.size()});
    Eigen::Map<Eigen::ArrayXf>(mean.data<float>(), sum.size()) =
        (sum / tokens.size()).cast<float>();
    means[layer] = mean;
  }
  return means;
}
