#!/bin/sh
# Make the virtual environment of constraints.txt once and link it as .venv.
# Environments are cached by the hash of the pins and the Python version, so a second checkout
# costs nothing and a changed pin builds a new one. MONE_VENV_CACHE moves the cache.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
cache=${MONE_VENV_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/megatron-mone}
probe='import sys, venv, ensurepip; sys.exit(not sys.version_info >= (3, 12))'

find_python() {
    for candidate in "${PYTHON:-}" python3.12 python3 python3.13; do
        if [ -n "$candidate" ] && "$candidate" -c "$probe" >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    if command -v pyenv >/dev/null 2>&1; then
        for version in $(pyenv versions --bare 2>/dev/null | grep -E '^3\.1[2-9]' || true); do
            candidate=$(pyenv prefix "$version")/bin/python
            if "$candidate" -c "$probe" >/dev/null 2>&1; then
                echo "$candidate"
                return
            fi
        done
    fi
    if command -v uv >/dev/null 2>&1; then
        candidate=$(uv python find '>=3.12' 2>/dev/null || true)
        if [ -n "$candidate" ] && "$candidate" -c "$probe" >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    fi
}

python=$(cd "$root" && find_python)
if [ -z "$python" ]; then
    echo "megatron-mone needs Python >= 3.12 with venv and found none: install one" \
        "('pyenv install 3.12', 'uv python install 3.12' or 'apt-get install python3.12-venv')," \
        "or name it: make PYTHON=/path/to/python3.12" >&2
    exit 1
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
key=$(cksum <"$root/constraints.txt" | tr " " "-")
env=$cache/py$version-$key

if [ ! -e "$env/.complete" ]; then
    mkdir -p "$cache"
    (
        flock 9 # two checkouts may set up at once
        if [ ! -e "$env/.complete" ]; then
            echo "setting up $env (about 6 GB, a few minutes) ..."
            rm -rf "$env"
            "$python" -m venv "$env"
            "$env/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
                -r "$root/constraints.txt"
            touch "$env/.complete"
        fi
    ) 9>"$cache/.lock"
fi
if [ "$(readlink "$root/.venv" 2>/dev/null || true)" != "$env" ]; then
    if [ -e "$root/.venv" ] && [ ! -L "$root/.venv" ]; then
        echo "$root/.venv is a real folder, not made by make: move it away and run make again" >&2
        exit 1
    fi
    ln -sfn "$env" "$root/.venv"
fi

# The CPU kernels, once per change of their sources; without a compiler one line says so.
"$root/.venv/bin/python" "$root/megatron_mone/kernels/cpu/build.py"
