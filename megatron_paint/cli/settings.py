"""`megatron-paint settings [KEY]`: every setting with its type, limits, default, meaning and source."""

import argparse
import os
import sys
from dataclasses import asdict

from megatron_paint.base.json_text import to_json
from megatron_paint.config import describe


def run(options: argparse.Namespace, _: list[str]) -> int:
    """Prints the settings. A reader that closes the pipe early, such as `head`, is no error."""
    try:
        print(settings_json(options.key) if options.json else settings_text(options.key), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more as it exits
    return 0


def settings_text(key: str | None) -> str:
    """All settings, those of a section, or one; UserError for a key that does not exist."""
    return "\n\n".join(_section_text(section) for section in _found(key))


def settings_json(key: str | None) -> str:
    """The same as a JSON list with one object for each setting."""
    return to_json([asdict(setting) for section in _found(key) for setting in section.settings], indent=1)


def _found(key: str | None) -> tuple[describe.SectionDescription, ...]:
    return describe.sections() if key is None else describe.find(key)


def _section_text(section: describe.SectionDescription) -> str:
    return "\n".join([f"{section.key}: {section.meaning}", *(_setting_text(setting) for setting in section.settings)])


def _setting_text(setting: describe.SettingDescription) -> str:
    kind = f"{setting.type}: {setting.allowed}" if setting.allowed else setting.type
    default = setting.default_text + (f" ({setting.source})" if setting.source else "")
    return f"  {setting.key}\n    {setting.meaning}\n    {kind}\n    default: {default}"
