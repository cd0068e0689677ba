#!/bin/sh
# Installs the Slurm that tests/slurm boots (Debian, Ubuntu; root). Without it those tests skip.
set -eu
for program in sbatch slurmctld slurmd munged; do
    PATH=$PATH:/usr/sbin command -v $program >/dev/null || missing=1
done
[ "${missing:-}" ] || exit 0
if ! command -v apt-get >/dev/null; then
    echo "slurm.sh: no apt-get: install slurmctld, slurmd and munge by hand to run tests/slurm" >&2
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    echo "slurm.sh: not root: apt-get install slurmctld slurmd slurm-client munge, to run tests/slurm" >&2
    exit 0
fi
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install -y --no-install-recommends \
        slurmctld slurmd slurm-client munge; } >"$log" 2>&1; then
    echo "slurm.sh: apt-get failed, so tests/slurm skip: $(grep -m 1 '^E:' "$log" || echo "see $log")" >&2
    exit 0
fi
rm "$log"
