// What balance "auto" means.
#pragma once

#include "hqq/config.hpp"

namespace hqq {

// Balance serves the same end as importance, and together they do worse.
inline Balance resolve_balance(Balance balance, bool has_importance) {
  if (balance != Balance::kAuto) return balance;
  return has_importance ? Balance::kNone : Balance::kSinkhorn;
}

}  // namespace hqq
