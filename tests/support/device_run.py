"""`megatron-paint` in a rank whose vLLM is `fake_vllm.py`, and whose GPUs are not looked at: for forked ranks."""

import sys
from pathlib import Path

from megatron_paint import __main__ as command
from megatron_paint.training import engines
from tests.support import fake_vllm


def run() -> None:
    """FOLDER ARGUMENTS...: the folder is for what ranks and servers share in the place of a GPU's memory."""
    fake_vllm.install(Path(sys.argv.pop(1)))
    engines.check_gpus = lambda vllm: None
    command.run()
