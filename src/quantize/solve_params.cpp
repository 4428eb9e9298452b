#include "src/quantize/solve_params.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "hqq/error.hpp"

namespace hqq {
namespace {

// Importance below this fraction of the mean counts as it: a column that was never active keeps a
// say.
constexpr float kMinImportance = 1e-4f;

core::MetaType meta_type(DType dtype) {
  if (dtype == DType::kF16) return core::MetaType::kF16;
  return dtype == DType::kBF16 ? core::MetaType::kBF16 : core::MetaType::kF32;
}

core::Shrinkage shrinkage(double beta, float lp_norm) {
  core::Shrinkage result;
  result.inv_beta = static_cast<float>(1.0 / beta);
  if (lp_norm < 2.0f) {
    // |r| up to this has shrink(r) = 0; the margin keeps rounding on the safe side.
    const double bound = std::pow(beta, -1.0 / (2.0 - static_cast<double>(lp_norm)));
    result.threshold = static_cast<float>(bound * 0.999);
  }
  return result;
}

std::string group_name(const core::GroupLayout& layout, std::int64_t group) {
  if (layout.axis == 0) return "group " + std::to_string(group);
  return "row " + std::to_string(group / layout.groups_per_row()) + ", group " +
         std::to_string(group % layout.groups_per_row());
}

}  // namespace

core::SolverParams solver_params(const LayerConfig& config) {
  core::SolverParams params;
  params.max_code = static_cast<float>(max_code(config.nbits));
  // 8-bit metadata is made from unrounded values afterwards.
  params.scale_type = config.quant_scale ? core::MetaType::kF32 : meta_type(config.meta_dtype);
  params.zero_type = config.quant_zero ? core::MetaType::kF32 : meta_type(config.meta_dtype);
  params.lp_norm = static_cast<float>(config.effective_lp_norm());
  params.round_zero = config.effective_round_zero();
  params.precise = nbits_of(config.nbits) >= 6;
  params.iterations = config.effective_iterations();
  params.shrinkage = shrinkage(config.beta, params.lp_norm);
  return params;
}

std::vector<core::Shrinkage> hqq_shrinkages(const LayerConfig& config) {
  constexpr int kBatch = core::kHqqBatch;
  const int steps = (config.effective_iterations() + kBatch - 1) / kBatch * kBatch;
  const auto lp_norm = static_cast<float>(config.effective_lp_norm());
  std::vector<core::Shrinkage> result;
  double beta = config.beta;
  for (int k = 0; k < steps; ++k) {
    result.push_back(shrinkage(beta, lp_norm));
    if (config.grow_beta) beta *= config.kappa;
  }
  return result;
}

std::vector<float> relative_importance(std::span<const float> importance) {
  double sum = 0.0;
  for (float h : importance) sum += static_cast<double>(h);
  const auto inv_mean = static_cast<float>(static_cast<double>(importance.size()) / sum);
  std::vector<float> weights(importance.size());
  for (std::size_t c = 0; c < weights.size(); ++c) {
    weights[c] = std::max(importance[c] * inv_mean, kMinImportance);
  }
  return weights;
}

void write_stats(const core::ErrorSums& total, std::int64_t numel, QuantizeStats& stats) {
  const auto n = static_cast<double>(numel);
  stats.mean_abs_error = total.abs_sum / n;
  stats.rms_error = std::sqrt(total.square_sum / n);
  stats.max_abs_error = total.max_abs;
  stats.relative_error =
      total.weight_square_sum > 0 ? std::sqrt(total.square_sum / total.weight_square_sum) : 0.0;
}

void throw_nonfinite(const std::string& name, std::uint64_t count, std::int64_t row,
                     std::int64_t col) {
  throw_invalid(name, "W holds " + std::to_string(count) + " values that are NaN or Inf" +
                          " (or overflow float32), the first at [" + std::to_string(row) + ", " +
                          std::to_string(col) + "]; weights must be finite");
}

void throw_overflow(const std::string& name, const core::GroupLayout& layout, std::int64_t group,
                    DType meta_dtype) {
  throw_invalid(name, "the scale or zero of " + group_name(layout, group) + " does not fit " +
                          std::string(dtype_name(meta_dtype)) +
                          "; use meta_dtype bfloat16 or float32, or smaller weights");
}

void throw_underflow(const std::string& name, const core::GroupLayout& layout, std::int64_t first,
                     std::int64_t count, float small) {
  std::ostringstream limit;
  limit.precision(3);
  limit << small;
  const std::string first_group = group_name(layout, first);
  const std::string groups =
      count == 1 ? first_group
                 : std::to_string(count) + " groups, of which " + first_group + " is the first,";
  throw_invalid(name, "the scale of " + groups + " is at most " + limit.str() +
                          ", too small for float16" +
                          "; use meta_dtype bfloat16 or float32, or larger weights");
}

}  // namespace hqq
