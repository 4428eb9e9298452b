// Picks the next token.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <hqq/error.hpp>
#include <random>
#include <span>
#include <vector>

// temperature 0: the most likely token. top_p below 1: one of the most likely tokens whose
// probabilities add up to it.
inline std::int64_t sample(std::span<const float> logits, float temperature, float top_p,
                           std::mt19937_64& random) {
  if (!std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); })) {
    hqq::throw_invalid("model", "its logits are no finite numbers, so there is no next token");
  }
  const auto best = std::max_element(logits.begin(), logits.end());
  if (temperature == 0) return best - logits.begin();
  std::vector<std::pair<float, std::int64_t>> candidates;  // probability (times a constant), token
  float total = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    candidates.emplace_back(std::exp((logits[i] - *best) / temperature), i);
    total += candidates.back().first;
  }
  if (top_p < 1) {
    // All tokens less likely than this have less than 1 - top_p together: no need to sort them.
    const float least = (1 - top_p) * total / static_cast<float>(logits.size());
    std::erase_if(candidates, [&](const auto& candidate) { return candidate.first < least; });
    std::sort(candidates.rbegin(), candidates.rend());
    float sum = 0;
    std::size_t count = 0;
    do sum += candidates[count++].first;
    while (count < candidates.size() && sum < top_p * total);
    candidates.resize(count);
    total = sum;
  }
  // Not std::discrete_distribution, which differs between standard libraries.
  float left = static_cast<float>(random() >> 40) * 0x1p-24f * total;
  for (const auto& [probability, token] : candidates) {
    if ((left -= probability) < 0) return token;
  }
  return candidates.back().second;
}
