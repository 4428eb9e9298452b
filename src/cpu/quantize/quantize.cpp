// hqq::cpu::quantize and dequantize: the order of work over a matrix.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>

#include "hqq/bitpack.hpp"
#include "hqq/core/codec.hpp"
#include "hqq/core/math.hpp"
#include "hqq/core/metadata.hpp"
#include "hqq/error.hpp"
#include "src/backend.hpp"
#include "src/cpu/parallel.hpp"
#include "src/cpu/quantize/balance.hpp"
#include "src/cpu/quantize/encode.hpp"
#include "src/cpu/quantize/solve.hpp"
#include "src/format/float_values.hpp"
#include "src/format/metadata.hpp"
#include "src/quantize/small_scales.hpp"
#include "src/quantize/solve_params.hpp"

namespace hqq::cpu {
namespace {

// Calls fn(row) for every row, in units of kUnitRows.
template <class Fn>
void parallel_rows(std::int64_t rows, int threads, const Fn& fn) {
  parallel_for((rows + kUnitRows - 1) / kUnitRows, threads, [&](std::int64_t unit) {
    const std::int64_t end = std::min(rows, (unit + 1) * kUnitRows);
    for (std::int64_t row = unit * kUnitRows; row < end; ++row) fn(row);
  });
}

void refuse_nonfinite(const QuantizeTask& task, const GroupSource& source) {
  std::vector<std::int64_t> counts(static_cast<std::size_t>(source.W.rows));
  std::vector<std::int64_t> firsts(counts.size());
  parallel_rows(source.W.rows, task.threads, [&](std::int64_t row) {
    const auto r = static_cast<std::size_t>(row);
    counts[r] = count_nonfinite(source, row, &firsts[r]);
  });
  std::int64_t total = 0;
  std::size_t first_row = 0;
  for (std::size_t r = counts.size(); r-- > 0;) {
    total += counts[r];
    if (counts[r] > 0) first_row = r;
  }
  if (total == 0) return;
  throw_nonfinite(task.name, static_cast<std::uint64_t>(total),
                  static_cast<std::int64_t>(first_row), firsts[first_row]);
}

// Importance in the space of the balanced weights: their error is multiplied by col_scale on the
// way back.
std::vector<float> column_weights(std::span<const float> importance,
                                  std::span<const float> col_scale) {
  std::vector<float> weights = relative_importance(importance);
  for (std::size_t c = 0; c < col_scale.size(); ++c) {
    weights[c] = weights[c] * col_scale[c] * col_scale[c];
  }
  return weights;
}

double blockwise_sum(std::span<const float> errors) {
  constexpr std::size_t kBlock = core::kErrorBlock;
  double total = 0.0;
  for (std::size_t begin = 0; begin < errors.size(); begin += kBlock) {
    double block = 0.0;
    for (float e : errors.subspan(begin, std::min(kBlock, errors.size() - begin))) {
      block += static_cast<double>(e);
    }
    total += block;
  }
  return total;
}

// Upstream's loop: all groups take a step, and the mean error of the whole matrix decides when to
// stop. Steps are taken in batches; the zeros of the step that stopped are picked afterwards.
void solve_hqq(SolveArgs& args, std::span<const core::Shrinkage> shrinkages, int threads) {
  const core::GroupLayout& layout = args.source.layout;
  const std::int64_t units = num_units(layout);
  const auto groups = static_cast<std::size_t>(layout.num_groups());
  args.step = SolveStep::kHqqStart;
  parallel_for(units, threads, [&](std::int64_t unit) { solve_unit(args, unit); });

  std::vector<float> step_zero(groups * kHqqBatch);
  std::vector<float> step_error(groups * kHqqBatch);
  args.step_zero = step_zero.data();
  args.step_error = step_error.data();
  args.step = SolveStep::kHqqSteps;
  double best = std::numeric_limits<double>::infinity();
  bool done = false;
  for (int first = 0; !done; first += kHqqBatch) {
    args.shrinkages = shrinkages.data() + first;
    parallel_for(units, threads, [&](std::int64_t unit) { solve_unit(args, unit); });
    std::size_t last = 0;
    for (int k = 0; k < kHqqBatch && !done; ++k) {
      last = static_cast<std::size_t>(k);
      const double total = blockwise_sum(std::span(step_error).subspan(last * groups, groups));
      // Upstream keeps the zero of the step that stopped it.
      done = total >= best || first + k + 1 == args.params.iterations;
      best = total;
    }
    std::copy_n(step_zero.begin() + static_cast<std::ptrdiff_t>(last * groups), groups, args.zero);
  }
  for (std::size_t g = 0; g < groups; ++g) args.scale[g] = 1.0f / args.scale[g];
}

// Scale and zero of every group.
void run_solver(SolveArgs& args, const LayerConfig& config, int threads) {
  // No default: the compiler names a solver that is missing.
  switch (config.solver) {
    case Solver::kHqq:
      return solve_hqq(args, hqq_shrinkages(config), threads);
    case Solver::kJoint:
      args.step = SolveStep::kJoint;
      break;
    case Solver::kMinMax:
      args.step = SolveStep::kMinMax;
      break;
  }
  parallel_for(num_units(args.source.layout), threads,
               [&](std::int64_t unit) { solve_unit(args, unit); });
}

// Scale and zero as stored, and 1 / scale, [num_groups] each.
struct StoredGroups {
  std::vector<float> scale, inv_scale, zero;
  bool has_small_scale = false;
};

// Stores what was solved. With quant_scale the zero is refitted so that the middle code stays where
// it was when storing changed the scale.
StoredGroups store_groups(const QuantizeTask& task, std::span<const float> solved_scale,
                          std::span<float> solved_zero, QuantizedTensor& out) {
  const std::size_t groups = solved_scale.size();
  StoredGroups stored{std::vector<float>(groups), std::vector<float>(groups),
                      std::vector<float>(groups)};
  const float small = small_scale(task.config);
  std::atomic<bool> has_small_scale = false;
  const auto top_code = static_cast<float>(max_code(task.config.nbits));
  constexpr std::size_t kUnit = 64 * core::kMetadataBlock;
  parallel_for(static_cast<std::int64_t>((groups + kUnit - 1) / kUnit), task.threads,
               [&](std::int64_t unit) {
                 const std::size_t begin = static_cast<std::size_t>(unit) * kUnit;
                 const std::size_t end = std::min(begin + kUnit, groups);
                 const std::size_t count = end - begin;
                 store_metadata(solved_scale.subspan(begin, count), begin, out.scale,
                                out.scale_step, out.scale_offset, stored.scale.data() + begin);
                 for (std::size_t g = begin; g < end; ++g) {
                   const float scale = stored.scale[g];
                   stored.inv_scale[g] = 1.0f / scale;
                   if (scale <= small) has_small_scale = true;
                   if (task.config.quant_scale) {
                     solved_zero[g] =
                         core::refit_zero(solved_zero[g], solved_scale[g], scale, top_code);
                   }
                 }
                 store_metadata(solved_zero.subspan(begin, count), begin, out.zero, out.zero_step,
                                out.zero_offset, stored.zero.data() + begin);
                 for (std::size_t g = begin; g < end; ++g) {
                   if (std::isfinite(stored.scale[g]) && std::isfinite(stored.zero[g])) continue;
                   throw_overflow(task.name, out.layout(), static_cast<std::int64_t>(g),
                                  task.config.meta_dtype);
                 }
               });
  stored.has_small_scale = has_small_scale;
  return stored;
}

std::vector<float> reciprocals(std::span<const float> values) {
  std::vector<float> result(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) result[i] = 1.0f / values[i];
  return result;
}

core::ErrorSums sum_errors(std::span<const core::ErrorSums> rows) {
  core::ErrorSums total;
  for (const core::ErrorSums& row : rows) {
    total.abs_sum += row.abs_sum;
    total.square_sum += row.square_sum;
    total.weight_square_sum += row.weight_square_sum;
    total.max_abs = std::max(total.max_abs, row.max_abs);
  }
  return total;
}

}  // namespace

void quantize(const QuantizeTask& task, QuantizedTensor& out) {
  const LayerConfig& config = task.config;
  GroupSource source{task.W, out.layout()};
  refuse_nonfinite(task, source);

  std::vector<float> col_scale;
  std::vector<float> inv_col_scale;
  if (config.balance == Balance::kSinkhorn) {
    write_values(sinkhorn_factors(source, core::balance_tile_cols(source.layout), task.threads),
                 out.col_scale.dtype, out.col_scale.buffer.data);
    col_scale = read_values(out.col_scale);
    inv_col_scale = reciprocals(col_scale);
    source.inv_col_scale = inv_col_scale.data();
  }
  std::vector<float> importance;
  if (!task.importance.empty()) {
    importance = column_weights(task.importance, col_scale);
    source.importance = importance.data();
  }

  const auto groups = static_cast<std::size_t>(source.layout.num_groups());
  std::vector<float> solved_scale(groups);
  std::vector<float> solved_zero(groups);
  SolveArgs solve{source, SolveStep::kMinMax, solver_params(config), solved_scale.data(),
                  solved_zero.data()};
  run_solver(solve, config, task.threads);

  const StoredGroups stored = store_groups(task, solved_scale, solved_zero, out);
  if (stored.has_small_scale) {
    refuse_small_scales(task.name, task.W, source.layout, config,
                        {stored.scale, stored.zero, col_scale}, task.threads);
  }
  std::vector<core::ErrorSums> errors(
      task.stats != nullptr ? static_cast<std::size_t>(source.W.rows) : 0);
  EncodeArgs encode{source,
                    {stored.scale.data(), stored.inv_scale.data(), stored.zero.data()},
                    core::row_format(config.nbits),
                    col_scale.empty() ? nullptr : col_scale.data(),
                    out.W_q.data<std::uint8_t>(),
                    packed_row_bytes(config.nbits, source.W.cols),
                    errors.empty() ? nullptr : errors.data()};
  parallel_rows(source.W.rows, task.threads, [&](std::int64_t row) { encode_row(encode, row); });
  if (task.stats != nullptr) write_stats(sum_errors(errors), source.W.numel(), *task.stats);
}

void dequantize(const QuantizedTensor& q, Tensor& out, int threads) {
  const std::vector<float> scale = read_scale(q);
  const std::vector<float> zero = read_zero(q);
  const std::vector<float> col_scale =
      q.col_scale ? read_values(q.col_scale) : std::vector<float>();
  const DequantizeArgs args{q.layout(),
                            {scale.data(), nullptr, zero.data()},
                            core::row_format(q.config.nbits),
                            col_scale.empty() ? nullptr : col_scale.data(),
                            q.W_q.data<std::uint8_t>(),
                            packed_row_bytes(q.config.nbits, q.in_features)};
  const auto cols = static_cast<std::size_t>(q.in_features);
  parallel_rows(q.out_features, threads, [&](std::int64_t row) {
    std::byte* target =
        out.buffer.data + static_cast<std::size_t>(row) * cols * dtype_size(out.dtype);
    if (out.dtype == DType::kF32) {
      dequantize_row(args, row, reinterpret_cast<float*>(target));
      return;
    }
    thread_local std::vector<float> values;
    values.resize(cols);
    dequantize_row(args, row, values.data());
    write_values(values, out.dtype, target);
  });
}

}  // namespace hqq::cpu
