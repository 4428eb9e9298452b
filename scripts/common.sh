# Sourced by the other scripts: paths, messages, Python.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${HQQ_VENV:-$root/.venv}

step() { printf '\n== %s\n' "$*"; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Prints the Python to use: $PYTHON if set, else the first one on the PATH that is new enough.
find_python() {
  local candidates=(python3 python3.13 python3.12 python3.11 python3.10) candidate
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  die "none of these is a Python >= 3.10: ${candidates[*]}; name one: PYTHON=/path/to/python3 $0"
}

# Creates the virtual environment unless it is there and works. Sets $python.
make_venv() {
  python=$venv/bin/python
  if [ -x "$python" ] && "$python" -m pip --version >/dev/null 2>&1; then
    echo "virtual environment: $venv (kept)"
    return
  fi
  local base
  base=$(find_python)
  echo "virtual environment: $venv (new, from $base)"
  "$base" -m venv --clear "$venv"
}

pip_install() {
  "$python" -m pip install --disable-pip-version-check "$@"
}
