#!/usr/bin/env bash
# Sets everything up and runs all tests.
#
#   scripts/test.sh            everything (about half an hour on two cores from nothing)
#   scripts/test.sh --quick    without sanitizers, fuzzing and the consumer projects
#   scripts/test.sh --long     ten minutes of fuzzing a target, HQQ_LONG_TESTS=1 for the tests,
#                              Python threads with the thread sanitizer, CUDA also for sm_75,
#                              the oldest and the newest Transformers, every compiler, Debian 13
#   scripts/test.sh --no-torch without torch and what needs it: those Python tests are skipped
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

quick=false
long=false
torch=true
fuzz_seconds=20
for argument in "$@"; do
  case $argument in
    --quick) quick=true ;;
    --no-torch) torch=false ;;
    --long)
      long=true
      export HQQ_LONG_TESTS=1
      fuzz_seconds=600
      ;;
    *) die "unknown argument $argument (there are --quick, --long and --no-torch)" ;;
  esac
done
trap 'code=$?; [ $code -eq 0 ] || printf "\nFAILED in step: %s\n" "${current:-set-up}" >&2; exit $code' EXIT
begin() {
  current=$1
  step "$1 ($((SECONDS / 60)) min $((SECONDS % 60)) s)"
}

begin "System packages"
bash "$root/scripts/install-system-packages.sh" --tests

begin "Python environment"
make_venv
if $torch; then
  pip_install -q -r "$root/scripts/requirements-test.txt"
  pip_install -q --no-deps -r "$root/scripts/requirements-oracles.txt"
else
  grep -vE '^(torch|transformers|accelerate|peft|diffusers|sentence-transformers)=' \
    "$root/scripts/requirements-test.txt" >"$venv/requirements.txt"
  pip_install -q -r "$venv/requirements.txt"
fi

begin "Style: format and lint"
pip_install -q -r "$root/scripts/requirements-style.txt"
STYLE_BIN=$venv/bin bash "$root/scripts/check-style.sh"

# One name for the compiler in every build: ccache tells c++ and g++ apart.
CXX=${CXX:-$(command -v g++ || command -v c++)}
export CXX
configure=(-G Ninja -DHQQ_PYTHON=OFF -DHQQ_BUILD_TESTS=ON)
if command -v ccache >/dev/null; then
  # Relative paths, so that all build folders share results.
  export CMAKE_CXX_COMPILER_LAUNCHER=ccache CMAKE_CUDA_COMPILER_LAUNCHER=ccache
  export CCACHE_BASEDIR=$root CCACHE_NOHASHDIR=1
fi
for linker in mold lld; do
  if echo 'int main() {}' | "$CXX" -fuse-ld=$linker -x c++ - -o /dev/null 2>/dev/null; then
    configure+=(-DCMAKE_EXE_LINKER_FLAGS=-fuse-ld=$linker)
    break
  fi
done

build=$root/build/test
begin "C++ and CUDA: build"
cmake -S "$root" -B "$build" "${configure[@]}" -DCMAKE_BUILD_TYPE=Release -DHQQ_BUILD_BENCHMARKS=ON
cmake --build "$build"
if $long && command -v nvcc >/dev/null; then
  begin "CUDA for sm_75: build"
  cmake -S "$root" -B "$root/build/sm_75" "${configure[@]}" -DHQQ_CUDA=ON \
    -DHQQ_CUDA_ARCHITECTURES=75
  cmake --build "$root/build/sm_75" --target hqq_cuda
fi
begin "C++: tests"
ctest --test-dir "$build" --output-on-failure -j "$(nproc)" | tee "$build/ctest.txt"

if ! $quick; then
  sanitized=$root/build/sanitize
  begin "C++ with address and undefined-behaviour sanitizers: build"
  # -O1 -g1: stack traces with lines, at half the compile time of -O2 -g.
  cmake -S "$root" -B "$sanitized" "${configure[@]}" -DHQQ_SANITIZE=address,undefined -DHQQ_UNITY=ON \
    -DCMAKE_CUDA_COMPILER=NOTFOUND -DHQQ_BUILD_CLI=OFF -DHQQ_BUILD_EXAMPLES=OFF \
    -DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1"
  cmake --build "$sanitized"
  begin "C++ with address and undefined-behaviour sanitizers: tests"
  ctest --test-dir "$sanitized" --output-on-failure -j "$(nproc)" | tee "$sanitized/ctest.txt"

  begin "Fuzzing"
  bash "$root/scripts/fuzz.sh" "$fuzz_seconds"

  begin "C++ with the thread sanitizer"
  if $long; then bash "$root/scripts/tsan.sh" --python; else bash "$root/scripts/tsan.sh"; fi

  begin "Another compiler: warnings"
  # The newest of those that are here; --long builds and tests with all of them.
  other=$(compgen -c clang++- | grep -E '^clang\+\+-[0-9]+$' | sort -V | tail -n 1 || true)
  if [ -n "$other" ]; then
    bash "$root/scripts/test-compilers.sh" --quick "clang-${other#clang++-}"
  else
    echo "skipped: no clang++-N (Debian package clang)"
  fi

  begin "Kernels for 64-bit Arm, emulated"
  if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
    bash "$root/scripts/test-neon.sh"
  else
    echo "skipped: no aarch64-linux-gnu-g++ or qemu-aarch64"
    echo "(Debian packages g++-aarch64-linux-gnu and qemu-user)"
  fi

  begin "Consumer projects: installed package and subdirectory"
  bash "$root/tests/install/run.sh" "$build" "$root/build/consumer"
fi

begin "Python: sdist and wheel"
bash "$root/scripts/build-wheel.sh" --quick --python "$python"
pip_install -q --force-reinstall --no-deps "$root"/build/dist/hqq_cpp-*.whl
"$venv/bin/hqq-cpp" --version

begin "Summaries"
for log in "$build/ctest.txt" "${sanitized:-$build}/ctest.txt"; do
  echo "$log:"
  grep -E 'tests passed|Total Test time' "$log"
done
begin "Python: tests and the examples in docstrings"
cd "$root"
HQQ_TEST_WHEEL=1 HQQ_RUN=$build/examples/hqq-run/hqq-run HQQ_CUDA_SIMT=$build/cuda/libhqq_cuda_simt.so PATH=$venv/bin:$PATH "$python" -m pytest tests/python
if $long; then
  begin "Python: the oldest and the newest Transformers"
  bash "$root/scripts/test-versions.sh"
  begin "Every compiler that is here"
  bash "$root/scripts/test-compilers.sh"
  begin "Debian 13"
  bash "$root/scripts/test-debian13.sh"
fi
