#!/bin/sh
# Installs the Slurm that tests/slurm boots (Debian, Ubuntu; root). Without it those tests skip.
set -eu
. "$(dirname "$0")/packages.sh"
for program in sbatch slurmctld slurmd munged; do
    PATH=$PATH:/usr/sbin command -v $program >/dev/null || missing=1
done
[ -z "${missing:-}" ] || install_packages tests/slurm slurmctld slurmd slurm-client munge
