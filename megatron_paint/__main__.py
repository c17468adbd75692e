"""`python -m megatron_paint` is `megatron-paint`."""

import sys

from megatron_paint.cli import main

if __name__ == "__main__":
    sys.exit(main())
