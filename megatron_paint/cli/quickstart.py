"""`megatron-paint quickstart`: trains the tiny model that comes with the package, in a folder of the user's choice."""

import argparse
import json
import os
import re
import shlex
import shutil
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.config.examples import examples_folder

SETTINGS = "paint.yaml"
PATHS = re.compile(r"examples/quickstart/(?P<file>\S+)|(?P<run>runs/\S+)")  # of files and runs in the shipped settings
PLAIN = re.compile(r"[\w./-]+")  # needs no quotes in YAML


def run(options: argparse.Namespace, _: list[str]) -> int:
    """Copies the quickstart into the folder, unless it is there, and trains; a finished run prints its results."""
    from megatron_paint.cli import train
    from megatron_paint.cli.main import parse

    folder = Path(os.path.abspath(options.out))
    copy_quickstart(folder)
    arguments = ["train", str(folder / SETTINGS), "--processes", str(options.processes)]
    arguments += [f"--{name.replace('_', '-')}" for name in ("dry_run", "quiet", "json") if getattr(options, name)]
    if not options.json and not options.quiet:
        print(f"the same run: megatron-paint {shlex.join(arguments)}", flush=True)
    return train.run(parse(arguments), arguments)


def copy_quickstart(folder: Path) -> None:
    """Copies model, problems, templates and settings to `folder`. The settings come last, so they mark a complete copy.

    The copied settings name the files by their new paths. A folder with the settings stays as it is, so that a run in
    it resumes. UserError: the folder holds something else, or cannot be written.
    """
    if (folder / SETTINGS).is_file():
        return
    if not str(folder).isprintable():
        raise UserError(f"--out={str(folder)!r} has characters that cannot be printed: give another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out={folder} exists and is not a quickstart (it has no {SETTINGS}): give another folder")
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(examples_folder() / "quickstart", unfinished, copy_function=shutil.copyfile)
        for path in sorted(unfinished.glob("*.yaml")):
            path.write_text(_moved(path.read_text(encoding="utf-8"), folder), encoding="utf-8")
        folder.mkdir(exist_ok=True)  # one that exists is kept: it may be the current folder of a shell
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == SETTINGS):
            path.rename(folder / path.name)
    except OSError as error:
        raise UserError(f"--out={folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _moved(text: str, folder: Path) -> str:
    """The text of a settings file whose paths lead into `folder`. Everything else stays as it is."""

    def moved(found: re.Match[str]) -> str:
        path = str(folder / found["file"] if found["file"] else folder / found["run"])
        in_comment = "#" in text[text.rfind("\n", 0, found.start()) + 1 : found.start()]
        if in_comment:  # a command to copy
            return shlex.quote(path)
        return path if PLAIN.fullmatch(path) else json.dumps(path, ensure_ascii=False)

    return PATHS.sub(moved, text)
