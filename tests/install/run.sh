#!/usr/bin/env bash
# Builds the consumer project against hqq in the three ways it can be had: installed static library
# (from the finished build folder BUILD), subdirectory with a shared library, and that one installed.
#
#   tests/install/run.sh BUILD WORK
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 BUILD WORK" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
build=$(cd "$1" && pwd)
mkdir -p "$2"
work=$(cd "$2" && pwd)

# consume NAME CMAKE_ARGUMENTS...: configures, builds and runs the consumer in WORK/NAME.
consume() {
  local name=$1
  shift
  echo "-- consumer: $name"
  rm -rf "${work:?}/$name/CMakeCache.txt"
  cmake -S "$here" -B "$work/$name" -G Ninja "$@" >"$work/$name.log" 2>&1 &&
    cmake --build "$work/$name" >>"$work/$name.log" 2>&1 || { cat "$work/$name.log" >&2; return 1; }
  "$work/$name/consumer" && "$work/$name/pointers"
}

rm -rf "$work/static" "$work/shared"
cmake --install "$build" --prefix "$work/static" >/dev/null
consume find-static -DCMAKE_BUILD_TYPE=Release "-DCMAKE_PREFIX_PATH=$work/static"

# -O1: this build shows that it links, not that it is fast.
consume subdirectory-shared "-DHQQ_SUBDIRECTORY=$(cd "$here/../.." && pwd)" -DHQQ_INSTALL=ON \
  -DBUILD_SHARED_LIBS=ON -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1
cmake --install "$work/subdirectory-shared" --prefix "$work/shared" >/dev/null
consume find-shared -DCMAKE_BUILD_TYPE=Release "-DCMAKE_PREFIX_PATH=$work/shared"

# The installed command runs from where it was put.
"$work/static/bin/hqq-cpp" --version
# A package of another version is refused.
mkdir -p "$work/wrong"
printf '%s\n' 'cmake_minimum_required(VERSION 3.20)' 'project(wrong CXX)' \
  'find_package(hqq 99 CONFIG REQUIRED)' >"$work/wrong/CMakeLists.txt"
if cmake -S "$work/wrong" -B "$work/wrong/build" -G Ninja "-DCMAKE_PREFIX_PATH=$work/static" \
  >"$work/wrong.log" 2>&1; then
  echo "find_package(hqq 99) was accepted" >&2
  exit 1
fi
echo "-- consumer: all passed"
