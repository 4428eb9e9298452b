#!/usr/bin/env bash
# ThreadSanitizer over what uses threads: data races, and locks taken in different orders.
#
#   scripts/tsan.sh            the C++ tests of pools, pipelines, runs that resume, and products
#   scripts/tsan.sh --python   also the module, called by several Python threads at once
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

python_too=false
case ${1:-} in
  '') ;;
  --python) python_too=true ;;
  *) die "unknown argument $1 (there is only --python)" ;;
esac

build=$root/build/tsan
tests=(parallel_test pipeline_test resume_test linear_test)
targets=("${tests[@]}")
# Not told: fences of Eigen, which the sanitizer does not follow, and registers that GCC's own headers leave
# undefined.
configure=(-DHQQ_SANITIZE=thread -DHQQ_CUDA=OFF -DHQQ_BUILD_CLI=OFF -DHQQ_BUILD_EXAMPLES=OFF
  -DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1 -Wno-tsan -Wno-uninitialized")
if $python_too; then
  make_venv
  configure+=(-DHQQ_PYTHON=ON "-DPython_EXECUTABLE=$python")
  targets+=(_core)
fi
# GCC, whose runtime Python can load before everything else.
cmake -S "$root" -B "$build" -G Ninja "-DCMAKE_CXX_COMPILER=${CXX:-g++}" "${configure[@]}"
cmake --build "$build" --target "${targets[@]}"

# Tests that limit the process stop the sanitizer too; of the products, those on several threads.
filter='-*ThreadCanBeStarted*:StartThread.*:*AFailedWriteIsReported*'
export TSAN_OPTIONS="halt_on_error=1 exitcode=66"
for test in "${tests[@]}"; do
  if [ "$test" = linear_test ]; then filter='*Threads*:*ManyCalls*'; fi
  echo "$test"
  "$build/tests/$test" --gtest_brief=1 "--gtest_filter=$filter"
done
if $python_too; then
  # Without threads of numpy, which was not compiled for the sanitizer.
  LD_PRELOAD=$("${CXX:-g++}" -print-file-name=libtsan.so) OPENBLAS_NUM_THREADS=1 \
    PYTHONPATH=$build/python "$python" "$root/tests/python/support/threads_under_tsan.py"
fi
echo "no data race"
