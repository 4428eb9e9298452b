#!/usr/bin/env bash
# Builds library, command, tests and examples with one compiler after the other, with warnings as
# errors, and runs the C++ tests: the bytes of results must be those of tests/golden each time.
#
#   scripts/test-compilers.sh                     every compiler below that is here
#   scripts/test-compilers.sh clang-19 gcc-13     these
#   scripts/test-compilers.sh --quick [NAME...]   only checks the sources of library, command and hqq-run
#   scripts/test-compilers.sh --install NAME...   first installs what is missing (root and apt-get; zig by pip)
#
# Names: gcc-N, clang-N (g++-N and clang++-N of the PATH), zig (the newest clang, with libc++: the
# Python package ziglang), and zig-aarch64-linux, zig-aarch64-macos (sources are compiled, nothing runs).
# HQQ_COMPILERS is the folder to build in, build/compilers if it is not set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
folder=${HQQ_COMPILERS:-$root/build/compilers}

quick=false
install=false
names=()
for argument in "$@"; do
  case $argument in
    --quick) quick=true ;;
    --install) install=true ;;
    gcc-* | clang-* | zig | zig-aarch64-linux | zig-aarch64-macos) names+=("$argument") ;;
    *) die "unknown argument $argument (there are --quick, --install and names as gcc-13, clang-19, zig)" ;;
  esac
done
asked=true
if [ ${#names[@]} -eq 0 ]; then
  asked=false
  names=(gcc-12 gcc-13 gcc-14 clang-14 clang-16 clang-19 zig zig-aarch64-linux zig-aarch64-macos)
fi

# Prints the command of a compiler, or nothing where it is missing.
command_of() {
  case $1 in
    gcc-*) command -v "g++-${1#gcc-}" ;;
    clang-*) command -v "clang++-${1#clang-}" ;;
    zig*) [ ! -x "$folder/zig-venv/bin/python-zig" ] || echo "$folder/$1/c++" ;;
  esac || true
}

package_of() {
  case $1 in
    gcc-*) echo "the Debian package g++-${1#gcc-}" ;;
    clang-*) echo "the Debian package $1" ;;
    zig*) echo "the Python package ziglang" ;;
  esac
}

install_compiler() {
  case $1 in
    gcc-*) apt-get install -q -y --no-install-recommends "g++-${1#gcc-}" ;;
    clang-*) apt-get install -q -y --no-install-recommends "$1" ;;
    zig*)
      venv=$folder/zig-venv make_venv
      "$folder/zig-venv/bin/python" -m pip install --disable-pip-version-check -q ziglang
      ;;
  esac
}

# One program that CMake can call: zig's clang is a subcommand.
write_zig_wrapper() {
  local target=()
  case $1 in
    zig-*-linux) target=(-target "${1#zig-}-gnu") ;;
    zig-*) target=(-target "${1#zig-}") ;;
  esac
  mkdir -p "$folder/$1"
  printf '#!/bin/sh\nexec "%s" c++ %s "$@"\n' "$folder/zig-venv/bin/python-zig" "${target[*]}" >"$folder/$1/c++"
  chmod +x "$folder/$1/c++"
}

# Headers without the C library's: those of this machine do not fit another system.
link_headers() {
  mkdir -p "$1"
  local header
  for header in hwy nlohmann CLI unicode eigen3/Eigen eigen3/unsupported xxhash.h xxh3.h pcre2.h; do
    [ ! -e "/usr/include/$header" ] || ln -sfn "/usr/include/$header" "$1/$(basename "$header")"
  done
}

# Reads command lines, each ended by NUL, and runs them on all cores.
run_all() { xargs -0 -P "$(nproc)" -I{} bash -c '{}'; }

cross_compile() {
  local name=$1 compiler=$2 headers=$folder/headers source object
  link_headers "$headers"
  for source in "$root"/src/{,cpu/,io/,model/,cuda/,cli/}*.cpp "$root"/src/cpu/linear/[!a]*.cpp \
    "$root"/examples/hqq-run/*.cpp; do
    # CMakeLists.txt: no CUDA there.
    if [[ $name = *-macos && $source = */src/cuda/* ]]; then continue; fi
    object=${source#"$root"/}
    printf '%q ' "$compiler" -std=c++20 -O0 -ffp-contract=off -Wall -Wextra -Werror -DXXH_INLINE_ALL \
      "-DHWY_DISABLED_TARGETS=(HWY_SVE|HWY_SVE2|HWY_SVE_256|HWY_SVE2_128)" -I"$root" -I"$root/include" \
      -isystem "$headers" -c "$source" -o "$folder/$name/${object//\//_}.o"
    printf '\0'
  done | run_all
}

configure() {
  local name=$1 compiler=$2
  shift 2
  local options=(-DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS=-Werror -DHQQ_PYTHON=OFF
    -DCMAKE_CUDA_COMPILER=NOTFOUND -DCMAKE_EXPORT_COMPILE_COMMANDS=ON)
  if command -v ccache >/dev/null; then options+=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache); fi
  cmake -S "$root" -B "$folder/$name" -G Ninja "-DCMAKE_CXX_COMPILER=$compiler" "${options[@]}" "$@"
}

check_sources() {
  # zig wants to see a result.
  local how=-fsyntax-only
  if [ "$1" = zig ]; then how=-O0; fi
  configure "$1" "$2" -DHQQ_BUILD_TESTS=OFF
  "$(find_python)" - "$folder/$1/compile_commands.json" $how <<'PYTHON' | run_all
import json, shlex, sys
for entry in json.load(open(sys.argv[1])):
    print(f"cd {shlex.quote(entry['directory'])} && {entry['command']} {sys.argv[2]}", end="\0")
PYTHON
}

build_and_test() {
  local options=(-DHQQ_BUILD_TESTS=ON)
  # The system's libraries may be built with a newer GCC than this one. Shared ones find what they need
  # when they are loaded; GoogleTest, which is static, is built from its sources.
  case $1 in
    gcc-*) options+=(-DCMAKE_EXE_LINKER_FLAGS=-Wl,--allow-shlib-undefined) ;;
  esac
  if [ -d /usr/src/googletest ]; then
    options+=(-DCMAKE_DISABLE_FIND_PACKAGE_GTest=ON
      -DFETCHCONTENT_SOURCE_DIR_HQQ_GTEST=/usr/src/googletest)
  fi
  # ICU speaks C++, and zig brings libc++.
  if [ "$1" = zig ]; then options+=(-DHQQ_BUILD_EXAMPLES=OFF); fi
  configure "$1" "$2" "${options[@]}"
  cmake --build "$folder/$1"
  ctest --test-dir "$folder/$1" --output-on-failure -j "$(nproc)"
}

export CCACHE_BASEDIR=$root CCACHE_NOHASHDIR=1
results=()
tried=false
failed=false
for name in "${names[@]}"; do
  step "$name"
  compiler=$(command_of "$name")
  if [ -z "$compiler" ] && $install; then
    install_compiler "$name"
    compiler=$(command_of "$name")
  fi
  if [ -z "$compiler" ]; then
    if $asked; then die "$name is not here; install $(package_of "$name"), or use --install"; fi
    results+=("$name: skipped, not here (install $(package_of "$name"), or use --install)")
    continue
  fi
  tried=true
  case $name in
    zig*) write_zig_wrapper "$name" ;;
  esac
  case $name in
    zig-*) work=cross_compile ;;
    *) if $quick; then work=check_sources; else work=build_and_test; fi ;;
  esac
  # Not in a condition, where set -e would count for nothing.
  set +e
  (set -e && "$work" "$name" "$compiler")
  code=$?
  set -e
  if [ $code -eq 0 ]; then
    results+=("$name: $work passed ($("$compiler" --version | head -n 1))")
  else
    failed=true
    results+=("$name: $work FAILED")
  fi
done

step "Summary"
printf '%s\n' "${results[@]}"
$tried || die "none of these compilers is here"
! $failed
