#!/usr/bin/env bash
# Runs the tests of the Transformers and peft parts with the oldest and the newest versions that
# hqq_cpp says it works with. Environments are kept in build/versions.
#
#   scripts/test-versions.sh                  the oldest and the newest Transformers
#   scripts/test-versions.sh torch==2.14.1    with that version; what else is pinned as always
#
# Takes the wheel in build/dist, where scripts/test.sh puts it, or builds one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

limit() {
  sed -n "s/^$1 = (\([0-9]*\), \([0-9]*\))/\1.\2/p" "$root/python/hqq_cpp/transformers/_versions.py"
}
pins=("$@")
if [ ${#pins[@]} -eq 0 ]; then
  pins=("transformers==$(limit OLDEST).*" "transformers==$(limit NEWEST).*")
fi

for pin in "${pins[@]}"; do
  step "$pin"
  venv=$root/build/versions/${pin//[^a-z0-9.]/-}
  make_venv
  grep -v "^${pin%%==*}==" "$root/scripts/requirements-test.txt" >"$venv/requirements.txt"
  pip_install -q "$pin" -r "$venv/requirements.txt"
  pip_install -q --no-deps -r "$root/scripts/requirements-oracles.txt"
  if ! ls "$root"/build/dist/hqq_cpp-*.whl >/dev/null 2>&1; then
    bash "$root/scripts/build-wheel.sh" --quick --python "$python"
  fi
  pip_install -q --force-reinstall --no-deps "$root"/build/dist/hqq_cpp-*.whl
  (cd "$root" && "$python" -m pytest -q tests/python/package/test_{after_import,versions}.py tests/python/peft \
    tests/python/transformers/test_{transformers_*,embedding_models,kv_cache,upstream_folders}.py \
    tests/python/{io/test_saved_folder_tools,nn/test_embedding,importance/test_importance_folder}.py)
done
