#include "src/cuda/solve.hpp"

#include <stdexcept>

#include "hqq/bitpack.hpp"
#include "hqq/device.hpp"
#include "src/cuda/handles.hpp"
#include "src/format/float_values.hpp"
#include "src/format/metadata.hpp"
#include "src/quantize/small_scales.hpp"
#include "src/quantize/solve_params.hpp"

namespace hqq::cuda {
namespace {

// What the kernels report, at the start of the workspace.
struct Findings {
  QuantizeProblems problems = kNoProblem;
  core::ErrorSums errors{};
};
constexpr std::size_t kFindingsBytes = 256;
static_assert(sizeof(Findings) <= kFindingsBytes);

SolverKind solver_kind(Solver solver) {
  // No default: the compiler names a solver that is missing.
  switch (solver) {
    case Solver::kMinMax:
      return SolverKind::kMinMax;
    case Solver::kJoint:
      return SolverKind::kJoint;
    case Solver::kHqq:
      return SolverKind::kHqq;
  }
  throw std::logic_error("a solver without kernels for CUDA");
}

// `shrinkages` must live until the launches are done; sizes do not depend on it.
QuantizeArgs make_args(const DeviceTask& task, const core::Shrinkage* shrinkages,
                       std::byte* workspace, std::size_t workspace_bytes) {
  QuantizeArgs args;
  args.W = task.W.data;
  args.W_type = task.W.dtype;
  args.row_stride = task.W.row_stride;
  args.importance = task.importance;
  args.solver = solver_kind(task.config.solver);
  args.params = solver_params(task.config);
  args.shrinkages = shrinkages;
  args.small_scale = small_scale(task.config);
  args.balance = task.config.balance == Balance::kSinkhorn;
  args.out = task.out;
  auto* findings = reinterpret_cast<Findings*>(workspace);
  args.problems = &findings->problems;
  args.errors = task.stats != nullptr ? &findings->errors : nullptr;
  args.workspace = workspace + kFindingsBytes;
  args.workspace_bytes = workspace_bytes - kFindingsBytes;
  return args;
}

// The rule is the CPU's; so rarely asked that W and the metadata are read back for it.
void check_small_scales(const DeviceTask& task, StreamHandle stream) {
  const auto read = [&](const void* from, std::byte* to, std::size_t bytes) {
    check(library().copy(to, from, bytes, stream), task.name);
  };
  QuantizedTensor q;
  q.config = task.config;
  q.out_features = task.W.rows;
  q.in_features = task.W.cols;
  q.allocate();
  const DeviceMatrix& out = task.out;
  for (const auto& [from, to] : {std::pair<const void*, Tensor*>{out.scale, &q.scale},
                                 {out.zero, &q.zero},
                                 {out.zero_step, &q.zero_step},
                                 {out.zero_offset, &q.zero_offset},
                                 {out.col_scale, &q.col_scale}}) {
    if (*to) read(from, to->buffer.data, to->buffer.size);
  }
  const std::int64_t numel = (task.W.rows - 1) * task.W.row_stride + task.W.cols;
  std::vector<std::byte> weights(static_cast<std::size_t>(numel) * dtype_size(task.W.dtype));
  read(task.W.data, weights.data(), weights.size());
  check(library().synchronize(stream), task.name);

  TensorView W = task.W;
  W.data = weights.data();
  const std::vector<float> col_scale =
      q.col_scale ? read_values(q.col_scale) : std::vector<float>();
  refuse_small_scales(task.name, W, q.layout(), q.config,
                      {read_values(q.scale), read_zero(q), col_scale}, default_threads());
}

}  // namespace

std::size_t solve_workspace_bytes(const DeviceTask& task) {
  static std::byte none[kFindingsBytes];
  std::size_t bytes = 0;
  check(library().quantize_workspace_bytes(make_args(task, nullptr, none, kFindingsBytes), &bytes),
        task.name);
  return kFindingsBytes + bytes;
}

void solve(const DeviceTask& task, void* workspace, std::size_t workspace_bytes,
           StreamHandle stream) {
  const Api& api = library();
  const std::string& what = task.name;
  Findings findings;
  check(api.copy(workspace, &findings, sizeof(findings), stream), what);
  const std::vector<core::Shrinkage> shrinkages = hqq_shrinkages(task.config);
  check(api.quantize(
            make_args(task, shrinkages.data(), static_cast<std::byte*>(workspace), workspace_bytes),
            stream),
        what);
  check(api.copy(&findings, workspace, sizeof(findings), stream), what);
  check(api.synchronize(stream), what);

  const QuantizeProblems& problems = findings.problems;
  if (problems.nonfinite > 0) {
    const auto first = static_cast<std::int64_t>(problems.first_nonfinite);
    throw_nonfinite(task.name, problems.nonfinite, first / task.W.cols, first % task.W.cols);
  }
  if (problems.first_overflow != kNoProblem.first_overflow) {
    throw_overflow(task.name, task.out.layout, static_cast<std::int64_t>(problems.first_overflow),
                   task.config.meta_dtype);
  }
  if (problems.first_small != kNoProblem.first_small) check_small_scales(task, stream);
  if (task.stats != nullptr) {
    write_stats(findings.errors, task.W.numel(), *task.stats);
  }
}

}  // namespace hqq::cuda
