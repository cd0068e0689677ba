# Sourced by slurm.sh, browser.sh and arm.sh: Debian packages that some tests need, and without which they skip.

# install_packages TESTS PACKAGE...: one line and success where that cannot be done, so that CI goes on.
install_packages() {
    script=$(basename "$0") tests=$1
    shift
    if ! command -v apt-get >/dev/null; then
        echo "$script: no apt-get: install $* by hand to run $tests" >&2
        return
    fi
    if [ "$(id -u)" != 0 ]; then
        echo "$script: not root: apt-get install $*, to run $tests" >&2
        return
    fi
    log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    if ! { apt-get update && apt-get install -y --no-install-recommends "$@"; } >"$log" 2>&1; then
        echo "$script: apt-get failed, so $tests skip: $(grep -m 1 '^E:' "$log" || echo "see $log")" >&2
        return
    fi
    rm "$log"
}
