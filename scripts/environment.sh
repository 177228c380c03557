# Sourced with a requirements file by quickstart.sh and test.sh: sets PYTHON to an interpreter that
# has what the file lists. It is the one given as PYTHON, or that of .venv, made where it is absent.

if [ -z "${PYTHON:-}" ]; then
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: Python 3.11 or newer is needed; 'python3' is $(python3 --version 2>&1)." \
             "Name another one: PYTHON=/path/to/python bash $0" >&2
        exit 2
    fi
    PYTHON=.venv/bin/python
    [ -x "$PYTHON" ] || python3 -m venv .venv
    wanted=$(cat requirements.txt "$1" | cksum)
    if [ "$(cat ".venv/installed_$1" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing $1 into .venv (PyTorch is large: several GB, some minutes) ..."
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$1"
        echo "$wanted" > ".venv/installed_$1"
    fi
fi
