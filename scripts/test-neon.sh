#!/usr/bin/env bash
# Compiles the kernels for 64-bit Arm and runs their test in an emulator. Needs the Debian packages
# g++-aarch64-linux-gnu, qemu-user and googletest (which libgtest-dev brings).
#
#   scripts/test-neon.sh [BUILD_FOLDER]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
build=${1:-$root/build/neon}
gtest=/usr/src/googletest/googletest
compiler=aarch64-linux-gnu-g++

for command in "$compiler" qemu-aarch64; do
  command -v "$command" >/dev/null || die "there is no $command here"
done
[ -e "$gtest/src/gtest-all.cc" ] || die "$gtest is missing"

flags=(-std=c++20 -O1 -ffp-contract=off -Wall -Wextra -Wno-psabi -pthread -DHQQ_TEST_NEON
  -I"$root" -I"$root/include" -isystem "$gtest/include" -isystem "$gtest")
sources=("$gtest"/src/gtest-all.cc "$gtest"/src/gtest_main.cc "$root"/tests/cpp/linear/linear_kernels_test.cpp
  "$root"/src/cpu/linear/isa/{neon,scalar}.cpp "$root"/src/cpu/linear/tiles/column_plan.cpp)
launcher=$(command -v ccache || true)

mkdir -p "$build"
for source in "${sources[@]}"; do
  printf '%s\0%s\0' "$source" "$build/$(basename "$source").o"
done | xargs -0 -n 2 -P "$(nproc)" bash -c '"${@:1:$#-2}" -c "${@: -2:1}" -o "${@: -1}"' bash \
  $launcher "$compiler" "${flags[@]}"
"$compiler" -pthread "$build"/*.o -o "$build/linear_kernels_test"
# -L: where the cross compiler's libraries are.
qemu-aarch64 -L /usr/aarch64-linux-gnu "$build/linear_kernels_test" --gtest_brief=1
