#!/bin/sh
# Installs the compiler and the emulator that tests/unit/kernels/test_cpu_arm.py runs the NEON kernels with (Debian,
# Ubuntu; root). Without them it skips.
set -eu
. "$(dirname "$0")/packages.sh"
for program in aarch64-linux-gnu-g++ qemu-aarch64; do
    command -v $program >/dev/null || missing=1
done
[ -z "${missing:-}" ] || install_packages "tests of the NEON kernels" g++-aarch64-linux-gnu qemu-user
