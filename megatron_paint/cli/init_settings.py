"""`megatron-paint init SIZE OBJECTIVE`: prints a complete settings file of a preset."""

import argparse

from megatron_paint.base.errors import UserError
from megatron_paint.config.examples import objectives, sizes


def run(options: argparse.Namespace, _: list[str]) -> int:
    """Prints the settings file, or with --list the names of all presets."""
    if options.list:
        if options.size is not None:
            raise UserError(f"init --list prints all presets and takes no name: leave out {options.size} or --list")
        width = max(map(len, sizes()))
        print("\n".join(f"{size:<{width}}  {' '.join(objectives(size))}" for size in sizes()))
        return 0
    if options.size is None or options.objective is None:
        raise UserError("init needs a model size and an objective, such as qwen3_8b paint; init --list prints all")
    from megatron_paint.config.resolve import resolved_preset

    print(resolved_preset(options.size, options.objective), end="")
    return 0
