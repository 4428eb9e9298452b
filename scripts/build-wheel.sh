#!/usr/bin/env bash
# Builds a source distribution, from it a manylinux wheel for each Python, and tests each wheel in an empty
# environment with no compiler in reach.
#
#   scripts/build-wheel.sh [--quick] [--python PYTHON]... [OUT]
#
#   PYTHON   3.10 or newer; without it, the one that the other scripts use
#   --quick  of tests/python only those of the wheel itself, and no packages but the few that they need
#   OUT      folder for the results; without it build/dist, where older ones are removed
#
# HQQ_CUDA=ON demands the CUDA part, OFF leaves it out; by default the wheel has it where there is an nvcc.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

quick=false
pythons=()
out=
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=true ;;
    --python)
      [ $# -gt 1 ] || die "--python needs the path of a Python"
      # find_python refuses what is too old.
      pythons+=("$(PYTHON=$2 find_python)")
      shift
      ;;
    -*) die "unknown option $1 (there are --quick and --python)" ;;
    *)
      [ -z "$out" ] || die "two folders for the results: $out and $1"
      out=$1
      ;;
  esac
  shift
done
[ ${#pythons[@]} -gt 0 ] || pythons=("$(find_python)")
if [ -z "$out" ]; then
  out=$root/build/dist
  rm -rf "$out"
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$root/build/wheels
mkdir -p "$work"

# Everything of /usr/bin but compilers and what builds with them: what a user's machine may have.
commands_without_compilers() {
  rm -rf "$1" && mkdir "$1"
  find /usr/bin /bin/ -maxdepth 1 ! -type d -printf '%f\0%p\0' |
    while IFS= read -r -d '' name && IFS= read -r -d '' path; do
      case $name in
        cc | c++* | c[0-9]*-* | cpp* | *gcc* | *g++* | *clang* | ld | ld.* | *-ld | as | nvcc | ccache) ;;
        cmake | ninja | make | pkg-config) ;;
        *) ln -sf "$path" "$1/$name" ;;
      esac
    done
}

build_sdist() {
  step "Source distribution"
  rm -rf "$work/sdist"
  (cd "$root" && "$python" -c 'import sys
from scikit_build_core import build
build.build_sdist(sys.argv[1])' "$work/sdist")
  # Built where a clone would be, seen from its build folder: ccache finds what other builds compiled.
  rm -rf "$work/source" && mkdir "$work/source"
  tar -xzf "$work"/sdist/hqq_cpp-*.tar.gz --strip-components=1 -C "$work/source"
}

# Builds for $python; sets $wheel.
build_wheel() {
  step "Wheel for $tag"
  rm -rf "$work/$tag-plain" "$work/$tag-wheel"
  SKBUILD_BUILD_DIR="$work/source/build/$tag" "$python" -m pip wheel -q --disable-pip-version-check \
    --no-deps --no-build-isolation --config-settings "cmake.define.HQQ_CUDA=${HQQ_CUDA:-AUTO}" \
    --wheel-dir "$work/$tag-plain" "$work/source"
  # libcuda belongs to the driver.
  PATH=$venv/bin:$PATH "$python" -m auditwheel repair -w "$work/$tag-wheel" --exclude libcuda.so.1 \
    "$work/$tag-plain"/hqq_cpp-*.whl
  wheel=$(echo "$work/$tag-wheel"/hqq_cpp-*manylinux*.whl)
  [ -f "$wheel" ] || die "auditwheel made no manylinux wheel of $(ls "$work/$tag-plain")"
}

test_wheel() {
  step "Tests of the wheel for $tag, with no compiler in reach"
  commands_without_compilers "$work/commands"
  local packages=(-r "$root/scripts/requirements-test.txt") tests=tests/python environment
  if $quick; then
    tests=tests/python/package/test_wheel.py
    mapfile -t packages < <(grep -E '^(pytest|hypothesis)==' "$root/scripts/requirements-test.txt")
  fi
  venv=$work/$tag-empty
  rm -rf "$venv" && make_venv
  pip_install -q "${packages[@]}" "$wheel"
  $quick || pip_install -q --no-deps -r "$root/scripts/requirements-oracles.txt"
  environment=(-u PYTHONPATH -u LD_LIBRARY_PATH -u CC -u CXX "PATH=$venv/bin:$work/commands")
  if env "${environment[@]}" "BASH_ENV=" bash -c 'command -v c++ cc gcc g++ clang'; then
    die "a compiler is in reach of the tests"
  fi
  (cd "$root" && env "${environment[@]}" HQQ_TEST_WHEEL=1 "$python" -m pytest -q $tests)
}

step "System packages"
bash "$root/scripts/install-system-packages.sh"
for base in "${pythons[@]}"; do
  tag=$("$base" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
  venv=$work/$tag-tools
  PYTHON=$base make_venv
  pip_install -q -r "$root/scripts/requirements-wheel.txt"
  [ -n "${sdist_built:-}" ] || build_sdist
  sdist_built=1
  build_wheel
  PYTHON=$base test_wheel
  cp "$wheel" "$out"
done
cp "$work"/sdist/hqq_cpp-*.tar.gz "$out"
step "Results in $out"
ls -l "$out"/hqq_cpp-*
