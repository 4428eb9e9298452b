#include "src/cpu/dispatch.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "hqq/error.hpp"
#include "hwy/highway.h"
#include "src/base/quoted_text.hpp"

namespace hqq::cpu {
namespace {

constexpr const char* kScalar = "scalar";

// A name that users choose, and the target of Highway's kernels behind it; two names that differ in
// src/cpu/linear only have the same. 0: the core's float instantiation, which Highway does not
// know.
struct Target {
  std::string name;
  std::int64_t hwy;
};

std::atomic<const Target*> chosen{nullptr};

#if defined(__x86_64__)
// Instructions that Highway has no target for, or none that names them.
bool has_avx512_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (c >> 11 & 1) != 0;
}
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && a >= 1 &&
         __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

// The targets compiled in (HWY_TARGETS) that the CPU supports, best (lowest bit) first.
std::vector<Target> find_targets() {
  hwy::SetSupportedTargetsForTest(0);
  std::vector<Target> targets;
  // Highway's own one-lane target is left out: the core's float instantiation does that job.
  std::int64_t rest = hwy::SupportedTargets() & HWY_TARGETS & ~HWY_SCALAR;
  while (rest != 0) {
    const std::int64_t target = rest & -rest;
    const std::string name = hwy::TargetName(target);
#if defined(__x86_64__)
    if (target == HWY_AVX3 && has_avx512_vnni()) targets.push_back({name + "_VNNI", target});
    if (target == HWY_AVX2 && has_avx_vnni()) targets.push_back({name + "_VNNI", target});
#endif
    targets.push_back({name, target});
    rest &= rest - 1;
  }
  targets.push_back({kScalar, 0});
  return targets;
}

const std::vector<Target>& targets() {
  static const std::vector<Target> list = find_targets();
  return list;
}

void choose(const std::string& name) {
  for (const Target& target : targets()) {
    if (name != target.name) continue;
    if (target.hwy != 0) {
      hwy::SetSupportedTargetsForTest(target.hwy);
      hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    }
    chosen = &target;
    return;
  }
  std::string list;
  for (const std::string& known : supported_targets()) list += (list.empty() ? "" : ", ") + known;
  throw_invalid("cpu",
                "target " + quote_name(name) + " is not supported here; this machine has " + list);
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
  for (const Target& target : targets()) names.push_back(target.name);
  return names;
}

const std::string& current_target() {
  initialize();
  return chosen.load(std::memory_order_relaxed)->name;
}

void set_target(const std::string& name) {
  initialize();
  choose(name);
}

bool use_scalar() {
  initialize();
  return chosen.load(std::memory_order_relaxed)->hwy == 0;
}

}  // namespace hqq::cpu
