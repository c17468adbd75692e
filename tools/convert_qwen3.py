"""Converts Qwen3 checkpoints: `python tools/convert_qwen3.py to-megatron | to-hf | check | inspect`.

It does the same as `megatron-paint convert`.
"""

import sys

from megatron_paint.cli.convert_options import main

if __name__ == "__main__":
    sys.exit(main())
