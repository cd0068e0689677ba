#!/bin/sh
# Installs the browser that tests/unit/reporting opens reports in (Debian; root). Without it those tests skip.
set -eu
. "$(dirname "$0")/packages.sh"
for program in chromium chromium-browser google-chrome chrome; do
    if command -v $program >/dev/null; then exit 0; fi
done
install_packages "tests of pages in a browser" chromium
