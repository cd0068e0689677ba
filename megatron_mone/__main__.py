"""`python -m megatron_mone`: the same as `megatron-mone`."""

import sys

from megatron_mone.commands.app import main

if __name__ == "__main__":
    sys.exit(main())
