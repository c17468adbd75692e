"""The settings of runs side by side: what differs from the defaults, and what differs between runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_paint.config import describe
from megatron_paint.config.saved import dotted

ABSENT = "default"  # shown for a setting that the version of a run did not have


def settings_rows(trees: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """A row for each setting, in the order of the settings classes. trees: config.yaml of each run; None: not known.

    `values` has a text for each run. `changed` is true where a run does not have the default, `differs` where the runs
    that are known do not agree.
    """
    known = {setting.key: setting for section in describe.sections() for setting in section.settings}
    found = [None if tree is None else _texts(tree) for tree in trees]
    order = list(known)
    keys = dict.fromkeys(key for texts in found if texts is not None for key in texts)
    place = {key: order.index(describe.general(key)) if describe.general(key) in known else len(order) for key in keys}
    return [_row(key, known.get(describe.general(key)), found) for key in sorted(keys, key=lambda key: place[key])]


def _texts(tree: Mapping[str, Any]) -> dict[str, str]:
    return {key: describe.yaml_text(value) for key, value in dotted(tree).items()}


def _row(
    key: str, setting: describe.SettingDescription | None, found: Sequence[Mapping[str, str] | None]
) -> dict[str, Any]:
    default = "" if setting is None else setting.default_text
    values = ["" if texts is None else texts.get(key, default or ABSENT) for texts in found]
    own = {value for value, texts in zip(values, found, strict=True) if texts is not None}
    return {
        "key": key,
        "values": values,
        "default": default,
        "meaning": "" if setting is None else setting.meaning,
        "changed": own != {default},
        "differs": len(own) > 1,
    }
