// What every backend derives from a config and from an importance, and how it reports what it
// found.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "hqq/config.hpp"
#include "hqq/core/group.hpp"
#include "hqq/core/params.hpp"
#include "hqq/quantizer.hpp"

namespace hqq {

core::SolverParams solver_params(const LayerConfig& config);

// Shrinkages of every step of solver "hqq", filled up to whole batches of core::kHqqBatch steps.
// The penalty beta stays, or grows by kappa a step with grow_beta.
std::vector<core::Shrinkage> hqq_shrinkages(const LayerConfig& config);

// Importance relative to its mean. A column that was never active keeps a say.
std::vector<float> relative_importance(std::span<const float> importance);

void write_stats(const core::ErrorSums& total, std::int64_t numel, QuantizeStats& stats);

[[noreturn]] void throw_nonfinite(const std::string& name, std::uint64_t count, std::int64_t row,
                                  std::int64_t col);
// The stored scale or zero of `group` is not finite.
[[noreturn]] void throw_overflow(const std::string& name, const core::GroupLayout& layout,
                                 std::int64_t group, DType meta_dtype);
// The stored scales of `count` groups, of which `first` is the first, are not above `small`.
[[noreturn]] void throw_underflow(const std::string& name, const core::GroupLayout& layout,
                                  std::int64_t first, std::int64_t count, float small);

}  // namespace hqq
