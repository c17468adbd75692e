"""README.md of an export: what was trained, on what, with which settings, how good it is, and with which versions.

It names files and models without their folders. It leaves out settings about the user's machines.
"""

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from megatron_paint import __version__
from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.hf_writer import CARD
from megatron_paint.checkpoints.hub import UNKNOWN_BASE, hub_model
from megatron_paint.checkpoints.run_state import RUN_STATE
from megatron_paint.config.saved import to_yaml, with_defaults
from megatron_paint.config.secrets import recorded_tree
from megatron_paint.records import EvalReport
from megatron_paint.report.settings_table import settings_rows
from megatron_paint.run.folder import RunFolder

NAME_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DATA_FILE = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|pq)(\.\w+)?$", re.IGNORECASE)
# Settings about machines, folders and accounts of the user. They change nothing about the weights.
PRIVATE = (
    *("run.dir", "run.resume", "run.allow_changes", "run.profile", "rollout.vllm.", "rollout.path"),
    *("run.loggers", "run.name", "run.project", "run.log_samples_every"),
)
NAMED = ("model.", "prompts.", "data.train", "evaluation.problems")  # their texts are names of files or models
METHODS = {
    "paint": ("PAINT", "https://arxiv.org/abs/2604.26573"),
    "opsd": ("OPSD", "https://arxiv.org/abs/2601.18734"),
    "grpo": ("GRPO", "https://arxiv.org/abs/2402.03300"),
    "sft": ("supervised fine-tuning", None),
}
CONFIG = "config.json"
LICENSE_KEYS = ("license", "license_name", "license_link")
PACKAGES = ("torch", "megatron-core", "transformers")


def card_of_run(folder: RunFolder, settings: Any, step: int, *, adapter: bool | None = None) -> str:
    """The card of the export after a step of a run. settings: the Settings, or the same as nested dictionaries.

    adapter: the export is a PEFT folder; None: as the settings say.
    """
    tree = recorded_tree(settings)
    model = tree["model"]
    found: list[EvalReport | str] = []
    for at in _shown_steps(folder, step):
        try:
            found.append(folder.read_eval(at))
        except UserError:
            found.append(f"The evaluation at step {at} could not be read.")
    if adapter is None:
        adapter = model["lora"] is not None and model["lora"]["export"] == "adapter"
    return model_card(tree, step=step, evaluations=found, adapter=adapter, license=_license(Path(model["hf_path"])))


def card_of_checkpoint(checkpoint: Path, base: Path, *, adapter: bool) -> str | None:
    """The card of an export that is converted from a checkpoint of a run; None: the checkpoint names no settings.

    base: the folder of the base, as the conversion gets it. adapter: the export is a PEFT folder.
    """
    try:
        state = json.loads((checkpoint / RUN_STATE).read_text(encoding="utf-8"))
        if isinstance(state, dict) and "settings" not in state:
            return None
        tree, step = state["settings"], int(state["step"])
        tree = tree | {"model": tree["model"] | {"hf_path": str(base)}}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint / RUN_STATE} is damaged ({error!r}); copy the checkpoint again") from error
    return card_of_run(RunFolder(checkpoint.parent.parent), with_defaults(tree), step, adapter=adapter)


@dataclass(frozen=True)
class Base:
    """The model that a run began with."""

    name: str  # without its folders
    id: str | None  # its name on the hub, which a local folder may have in its config
    local: bool


def _base(path: str) -> Base:
    name = model_name(path)
    if hub_model(path) is not None or _is_on_hub(path):
        return Base(name, name, local=False)
    return Base(name, _id_in_config(Path(path)), local=True)


def _id_in_config(folder: Path) -> str | None:
    """The name on the hub that transformers wrote into config.json. None: it has none, or the path of a folder."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = config.get("_name_or_path") if isinstance(config, dict) else None
    return found if isinstance(found, str) and _is_on_hub(found) else None


def model_card(
    tree: Mapping[str, Any],
    *,
    step: int,
    evaluations: Sequence[EvalReport | str] = (),
    adapter: bool = False,
    license: Mapping[str, str] | None = None,
) -> str:
    """The text of the card. tree: the complete settings as nested dictionaries.

    evaluations: reports, or a sentence in place of one. adapter: the export is a PEFT folder. license: keys of the head
    of the base's card, which the export keeps.
    """
    base, objective = _base(tree["model"]["hf_path"]), tree["objective"]["name"]
    method, _ = published(objective)
    return "\n".join(
        [
            "---",
            to_yaml(_head(tree, base, adapter, license or {})).strip(),
            "---",
            "",
            f"# {_text(base.name.rpartition('/')[2])}, {method}, step {step}",
            "",
            *_trained(tree, base, step, adapter),
            *_usage(base, adapter),
            *_evaluated(evaluations),
            *_settings(tree),
            *_versions(),
        ]
    )


def published(objective: str) -> tuple[str, str | None]:
    """The name of an objective's method and the address of its paper; a new objective has its own name and no paper."""
    return METHODS.get(objective, (objective, None))


def model_name(path: str) -> str:
    """The name of a model without its folders: that on the hub if it is known, else the last part of the path."""
    if (model := hub_model(path)) is not None:
        return model.id
    return path if _is_on_hub(path) else Path(os.path.abspath(path)).name


def data_name(source: str) -> str:
    """The name of problems without their folders: OWNER/NAME on the hub, a known name, or the last part of a path."""
    if DATA_FILE.search(source) or not _is_on_hub(source):
        return Path(source).name
    return source


def _is_on_hub(name: str) -> bool:
    return NAME_ON_HUB.fullmatch(name) is not None and not Path(name).exists() and not Path(name).parent.is_dir()


def _head(tree: Mapping[str, Any], base: Base, adapter: bool, license: Mapping[str, str]) -> dict[str, Any]:
    head: dict[str, Any] = {} if base.id is None else {"base_model": base.id}  # the hub accepts only its own names
    head["library_name"] = "peft" if adapter else "transformers"
    head |= {"pipeline_tag": "text-generation", "tags": _tags(tree)}
    train = tree["data"]["train"]
    if data_name(train) == train and "/" in train:
        head["datasets"] = [train]
    return head | dict(license)


def _tags(tree: Mapping[str, Any]) -> list[str]:
    tags = ["megatron_paint", tree["objective"]["name"]]
    tags += ["self-distillation"] if tree["objective"]["name"] in ("paint", "opsd") else []
    return tags + (["lora"] if tree["model"]["lora"] is not None else [])


def _trained(tree: Mapping[str, Any], base: Base, step: int, adapter: bool) -> Iterator[str]:
    method, source = published(tree["objective"]["name"])
    named = f"[{method}]({source})" if source else method
    yield f"`{_code(base.name)}` was trained with {named} by megatron_paint {__version__}."
    yield ""
    if base.local:
        origin = "" if base.id is None else f" Its {CONFIG} names `{_code(base.id)}`."
        yield f"* Base: a local folder with the name `{_code(base.name)}`.{origin}"
    lora = tree["model"]["lora"]
    if lora is None:
        yield "* Weights: all weights were trained."
    else:
        what = "this folder holds the adapters alone" if adapter else "the adapters are merged into the weights"
        yield f"* Weights: LoRA adapters of rank {lora['rank']} were trained; {what}."
    if (start := tree["model"].get("adapter_path")) is not None:
        yield f"* Start: the adapter `{_code(model_name(start))}`."
    if (start := tree["model"].get("megatron_path")) is not None:
        yield f"* Start: the Megatron checkpoint `{_code(Path(start).name)}`."
    data = tree["data"]
    yield f"* Training problems: `{_code(data_name(data['train']))}`, {data['problems_per_step']} a step."
    yield f"* Steps: {step} of {tree['run']['steps']}."
    if (problems := tree["evaluation"]["problems"]) is not None:
        yield f"* Held-out problems: `{_code(data_name(problems))}`."
    yield ""


def _usage(base: Base, adapter: bool) -> Iterator[str]:
    yield from ["## Use", "", "```python"]
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if adapter:
        yield "from peft import PeftModel"
    yield from ["", 'folder = "FOLDER"  # or the name on the hub', "tokenizer = AutoTokenizer.from_pretrained(folder)"]
    if adapter:
        what = "" if base.id else "  # the folder of the base, or its name on the hub"
        yield f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base.id or UNKNOWN_BASE)}){what}"
        yield "model = PeftModel.from_pretrained(base, folder)"
    else:
        yield "model = AutoModelForCausalLM.from_pretrained(folder)"
    yield from ["```", ""]


def _evaluated(evaluations: Sequence[EvalReport | str]) -> Iterator[str]:
    yield from ["## Evaluation", ""]
    reports = [found for found in evaluations if isinstance(found, EvalReport)]
    if not evaluations:
        yield from ["This run did no evaluation before this export.", ""]
        return
    if reports:
        yield "In per cent. The interval has a confidence of 95 % over the draw of problems."
        yield from ["", "| step | problems of | problems | Avg@n | interval | pass@n | maj@n | greedy | cut off | n |"]
        yield "|---:|---|---:|---:|---|---:|---:|---:|---:|---:|"
    for report in reports:
        metrics, n = report.metrics, report.samples_per_problem
        cells = [str(report.step), _text(report.benchmark), str(report.num_problems), _percent(metrics["avg"])]
        cells.append(f"{_percent(metrics['avg/low'])} to {_percent(metrics['avg/high'])}")
        cells += [_percent(metrics.get(name)) for name in (f"pass@{n}", f"maj@{n}", "greedy", "truncated_share")]
        yield f"| {' | '.join([*cells, str(n)])} |"
    yield ""
    for sentence in (found for found in evaluations if isinstance(found, str)):
        yield from [sentence, ""]


def _settings(tree: Mapping[str, Any]) -> Iterator[str]:
    yield from ["## Settings that differ from the defaults", "", "| setting | value | default |", "|---|---|---|"]
    for row in settings_rows([tree]):
        if row["changed"] and not row["key"].startswith(PRIVATE):
            value = _without_folders(row["key"], row["values"][0])
            default = "" if row["default"].startswith("none, must") else _cell(row["default"])
            yield f"| {_cell(row['key'])} | {_cell(value)} | {default} |"
    yield ""


def _without_folders(key: str, value: str) -> str:
    if key in ("model.hf_path", "model.adapter_path"):
        return model_name(value)
    if key in ("data.train", "evaluation.problems"):
        return data_name(value)
    if key.startswith(NAMED) or key.endswith(".grader"):
        return value.rsplit("/", 1)[-1]
    return value


def _versions() -> Iterator[str]:
    yield from ["## Versions", ""]
    yield f"* megatron_paint {__version__}"
    for name in PACKAGES:
        try:
            yield f"* {name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"* {name}: unknown version"
    yield from [f"* Python {platform.python_version()}", ""]


def _shown_steps(folder: RunFolder, step: int) -> list[int]:
    """The first and the last evaluation up to the step."""
    steps = [at for at in folder.evaluated_steps() if at <= step]
    return list(dict.fromkeys([*steps[:1], *steps[-1:]]))


def _license(folder: Path) -> dict[str, str]:
    """The licence in the head of the base's own card; empty: it has none."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    match = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        head = YAML(typ="base", pure=True).load(match[1]) if match else None  # texts alone: a date need not exist
    except (YAMLError, ValueError, RecursionError):
        return {}
    found = head if isinstance(head, dict) else {}
    return {key: found[key] for key in LICENSE_KEYS if isinstance(found.get(key), str)}


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f}"


def _text(text: str) -> str:
    """A text in a table or a heading, where it must not begin markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A text that stands between backticks."""
    return " ".join(text.split()).replace("`", "'")


def _cell(text: str) -> str:
    """A text as code in a table, where a bar would end the cell."""
    return f"`{_code(text)}`".replace("|", "\\|")
