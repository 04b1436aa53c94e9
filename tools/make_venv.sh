#!/bin/sh
# Make the virtual environment $1 with a Python >= 3.12 that really runs, and install this package into it.
set -eu
venv=$1

runs() { # a pyenv shim can be on PATH and still refuse to run
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    for candidate in "${PYTHON:-}" python3.12 python3.13 python3; do
        [ -n "$candidate" ] && runs "$candidate" && { command -v "$candidate"; return; }
    done
    for candidate in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[2-9]*/bin/python; do
        [ -x "$candidate" ] && runs "$candidate" && { echo "$candidate"; return; }
    done
    if command -v uv >/dev/null 2>&1; then
        candidate=$(uv python find '>=3.12' 2>/dev/null || true)
        [ -n "$candidate" ] && runs "$candidate" && { echo "$candidate"; return; }
    fi
    return 1
}

if [ -n "${PYTHON:-}" ] && ! runs "$PYTHON"; then
    echo "PYTHON=$PYTHON does not run as Python >= 3.12 with venv; looking for another one." >&2
fi
if ! python=$(find_python); then
    cat >&2 <<'TEXT'
No Python >= 3.12 was found that runs. Looked at: $PYTHON, python3.12, python3.13 and python3 on PATH,
pyenv's versions folder, and uv. Install one and run make again, for example:
    uv python install 3.12        or        pyenv install 3.12        or        apt-get install python3.12-venv
or name yours: make PYTHON=/path/to/python3.12 test
TEXT
    exit 1
fi

echo "Using $($python --version) at $python"
# A venv without pip is one whose making was interrupted.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[data,export,plot,test]'
touch "$venv/.installed"
