#!/usr/bin/env bash
# Installs the Debian/Ubuntu packages that the build needs and that are missing. Where it may not (no
# apt-get, or neither root nor sudo without a password) it lists them and fails.
#
#   scripts/install-system-packages.sh           compiler, CMake, libraries
#   scripts/install-system-packages.sh --tests   also what the C++ tests and benchmarks need
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tests=false
case ${1:-} in
  '') ;;
  --tests) tests=true ;;
  *) die "unknown argument $1 (there is only --tests)" ;;
esac

# A library counts as present when its package is installed or the compiler finds its header, so that
# self-built ones and other distributions work.
has_package() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
has_header() {
  printf '#include <%s>\n' "$1" |
    "${CXX:-c++}" -std=c++20 -I/usr/include/eigen3 -I/usr/local/include/eigen3 "${@:2}" -E \
      -x c++ - >/dev/null 2>&1
}
has_command() { command -v "$1" >/dev/null 2>&1; }
has_compiler() {
  printf '#include <concepts>\nint main() { return std::integral<int> ? 0 : 1; }\n' |
    "${CXX:-c++}" -std=c++20 -x c++ - -o /dev/null >/dev/null 2>&1
}
has_python_module() { "$base_python" -c "import $1" >/dev/null 2>&1; }
has_python_headers() {
  "$base_python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
}

missing=()
# need <package> <check> [argument]...
need() {
  local package=$1
  shift
  has_package "$package" || "$@" || missing+=("$package")
}
# Python may come from elsewhere than the distribution: only what it lacks counts.
base_python=$(find_python)
has_compiler || missing+=(g++)
has_command cmake || missing+=(cmake)
has_command ninja || missing+=(ninja-build)
has_command git || missing+=(git)
{ has_python_module venv && has_python_module ensurepip; } || missing+=(python3-venv)
has_python_headers || missing+=(python3-dev)
need libhwy-dev has_header hwy/highway.h
need libeigen3-dev has_header unsupported/Eigen/CXX11/ThreadPool
need nlohmann-json3-dev has_header nlohmann/json.hpp
need libcli11-dev has_header CLI/CLI.hpp
need libxxhash-dev has_header xxhash.h
need libpcre2-dev has_header pcre2.h -DPCRE2_CODE_UNIT_WIDTH=8
if $tests; then
  need libgtest-dev has_header gtest/gtest.h
  need libgmock-dev has_header gmock/gmock.h
  need librapidcheck-dev has_header rapidcheck.h
  need libboost-context-dev has_header boost/context/fiber.hpp
  need libicu-dev has_header unicode/regex.h
  need libbenchmark-dev has_header benchmark/benchmark.h
  need libsimde-dev has_header simde/x86/avx512.h
  need strace has_command strace
fi

if [ ${#missing[@]} -eq 0 ]; then
  echo "system packages: all there"
  exit 0
fi
# The test of kernels for 64-bit Arm is left out without these two.
if $tests && [ "$(uname -m)" = x86_64 ]; then
  has_command aarch64-linux-gnu-g++ || missing+=(g++-aarch64-linux-gnu)
  has_command qemu-aarch64 || missing+=(qemu-user)
fi
# Fuzzing is left out without clang and its libFuzzer.
if $tests && ! has_command clang++ && ! has_command clang++-14; then
  missing+=(clang libclang-rt-dev)
fi
# Saves a test run that compiles the library twice several minutes; nothing fails without it.
if $tests && ! has_command ccache; then missing+=(ccache); fi

echo "system packages missing: ${missing[*]}"
as_root=()
if [ "$(id -u)" -ne 0 ]; then as_root=(sudo -n); fi
if ! has_command apt-get; then
  die "there is no apt-get here; install what these Debian packages hold: ${missing[*]}"
fi
if [ ${#as_root[@]} -gt 0 ] && ! sudo -n true 2>/dev/null; then
  die "not root and no sudo without a password; run:
  sudo apt-get update && sudo apt-get install --no-install-recommends ${missing[*]}"
fi
"${as_root[@]}" apt-get update -q
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get install -q -y --no-install-recommends "${missing[@]}"
