#include "src/cpu/dispatch.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "hqq/error.hpp"
#include "hwy/highway.h"

namespace hqq::cpu {
namespace {

constexpr const char* kScalar = "scalar";

std::atomic<bool> scalar_chosen{false};

// The targets compiled in (HWY_TARGETS) that the CPU supports, best (lowest bit) first; maybe none.
std::vector<std::int64_t> hwy_targets() {
  hwy::SetSupportedTargetsForTest(0);
  std::vector<std::int64_t> targets;
  // Highway's own one-lane target is left out: the core's float instantiation does that job.
  std::int64_t rest = hwy::SupportedTargets() & HWY_TARGETS & ~HWY_SCALAR;
  while (rest != 0) {
    targets.push_back(rest & -rest);
    rest &= rest - 1;
  }
  return targets;
}

const std::vector<std::int64_t>& targets() {
  static const std::vector<std::int64_t> list = hwy_targets();
  return list;
}

void choose(const std::string& name) {
  if (name == kScalar) {
    scalar_chosen = true;
    return;
  }
  for (std::int64_t target : targets()) {
    if (name == hwy::TargetName(target)) {
      hwy::SetSupportedTargetsForTest(target);
      hwy::GetChosenTarget().Update(hwy::SupportedTargets());
      scalar_chosen = false;
      return;
    }
  }
  std::string list;
  for (const std::string& known : supported_targets()) list += (list.empty() ? "" : ", ") + known;
  throw_invalid("cpu", "target '" + name + "' is not supported here; this machine has " + list);
}

// Once, before the first kernel: the best target, or the one the environment names.
void initialize() {
  static const bool done = [] {
    choose(supported_targets().front());
    if (const char* name = std::getenv("HQQ_CPU_TARGET"); name != nullptr && *name != '\0') {
      choose(name);
    }
    return true;
  }();
  (void)done;
}

}  // namespace

std::vector<std::string> supported_targets() {
  std::vector<std::string> names;
  for (std::int64_t target : targets()) names.emplace_back(hwy::TargetName(target));
  names.emplace_back(kScalar);
  return names;
}

std::string current_target() {
  initialize();
  if (scalar_chosen) return kScalar;
  const std::int64_t supported = hwy::SupportedTargets() & HWY_TARGETS;
  return hwy::TargetName(supported & -supported);
}

void set_target(const std::string& name) {
  initialize();
  choose(name);
}

bool use_scalar() {
  initialize();
  return scalar_chosen.load(std::memory_order_relaxed);
}

}  // namespace hqq::cpu
