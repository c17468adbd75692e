"""Completion in a shell by argcomplete: commands, options, files, names of presets and keys of settings."""

import argparse
from collections.abc import Callable, Iterator


def complete(parser: argparse.ArgumentParser) -> None:
    """Prints the completions that the shell asked for, and ends the process. Without argcomplete it does nothing."""
    try:
        import argcomplete
    except ModuleNotFoundError:
        return
    add_completers(parser)
    argcomplete.autocomplete(parser)


def add_completers(parser: argparse.ArgumentParser) -> None:
    """Gives the arguments of all commands their completers."""
    completers: dict[str, Callable[..., list[str]]] = {
        "overrides": _overrides,
        "key": _keys,
        "size": _sizes,
        "objective": _objectives,
    }
    for command in _commands(parser):
        for action in command._actions:
            if action.dest in completers and not action.option_strings:
                action.completer = completers[action.dest]


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _commands(command)


def _overrides(**_: object) -> list[str]:
    return [f"{key}=" for key in _keys()]


def _keys(**_: object) -> list[str]:
    from megatron_paint.config import describe

    return [setting.key for section in describe.sections() for setting in section.settings]


def _sizes(**_: object) -> list[str]:
    from megatron_paint.config.examples import sizes

    return sizes()


def _objectives(*, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    from megatron_paint.config.examples import objectives, sizes

    return objectives(parsed_args.size) if parsed_args.size in sizes() else []
