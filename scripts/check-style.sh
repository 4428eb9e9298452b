#!/usr/bin/env bash
# Format, lint and types of C++, CUDA and Python, links and widths of the docs: the part of
# scripts/test.sh that needs no build.
#
#   scripts/check-style.sh          says what differs, and fails if anything does
#   scripts/check-style.sh --fix    formats
#
# Uses the tools of scripts/requirements-style.txt: those of $STYLE_BIN, or of the virtual
# environment, into which they are installed where they are missing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

fix=false
for argument in "$@"; do
  case $argument in
    --fix) fix=true ;;
    *) die "unknown argument $argument (there is --fix)" ;;
  esac
done

if [ -z "${STYLE_BIN:-}" ]; then
  make_venv
  pip_install -q -r "$root/scripts/requirements-style.txt"
  STYLE_BIN=$venv/bin
fi
cd "$root"
mapfile -t sources < <(git ls-files '*.cpp' '*.hpp' '*.h' '*.cu')

failed=()
check() {
  local name=$1
  shift
  echo "-- $name"
  "$@" || failed+=("$name")
}

if $fix; then
  "$STYLE_BIN/clang-format" -i "${sources[@]}"
  "$STYLE_BIN/ruff" check --fix-only .
  "$STYLE_BIN/ruff" format .
fi
check "clang-format" "$STYLE_BIN/clang-format" --dry-run --Werror "${sources[@]}"
check "ruff format" "$STYLE_BIN/ruff" format --check .
check "ruff check" "$STYLE_BIN/ruff" check .
check "sizes" python3 scripts/check_sizes.py
check "docs" python3 scripts/check_docs.py
check "mypy" "$STYLE_BIN/mypy"

[ ${#failed[@]} -eq 0 ] || die "style: ${failed[*]} (scripts/check-style.sh --fix formats)"
