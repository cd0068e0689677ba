"""Copy studies that have ended to docs/studies, and make all pages there and the README's table.

    python -m megatron_mone.commands.publish_studies out/studies/ratio-cpu ...

Without folders it makes the pages and the table of what is published.
"""

import sys
from pathlib import Path

from megatron_mone.studies.published import publish

if __name__ == "__main__":
    try:
        publish([Path(word) for word in sys.argv[1:]])
    except ValueError as error:
        sys.exit(f"megatron-mone: error: {error}")
