#!/bin/sh
# Install constraints-bench.txt once into a folder beside the virtual environment and print its path
# (nothing if that fails: the race then lists the peers as absent). Run after tools/bootstrap.sh.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
pins=$root/constraints-bench.txt
key=$(cat "$root/constraints.txt" "$pins" | cksum | tr " " "-")
folder=$(dirname "$(readlink -f "$root/.venv")")/bench-$key

install() {
    "$python" -m pip install --quiet --quiet --disable-pip-version-check --no-deps \
        --target "$folder" "$@"
}
pinned() { grep -E "^($1)==" "$pins"; }

if [ ! -e "$folder/.complete" ]; then
    echo "setting up the peers of the race in $folder ..." >&2
    rm -rf "$folder"
    export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu
    export PYTHONPATH="$folder" # the build needs setuptools from there
    if install $(pinned 'setuptools|wheel') >&2 &&
        install --no-build-isolation $(pinned deepspeed) >&2 &&
        install $(grep -Ev '^(#|setuptools|wheel|deepspeed)' "$pins") >&2; then
        touch "$folder/.complete"
    else
        echo "the peers of the race could not be installed: going on without DeepSpeed" >&2
        rm -rf "$folder"
        exit 0
    fi
fi
echo "$folder"
