"""Finds the folders of a model that settings name: on the hub, or as a PEFT adapter with its base."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from megatron_paint.base.errors import UserError, about
from megatron_paint.checkpoints.hub import local_folder
from megatron_paint.checkpoints.peft import ADAPTER_CONFIG, is_adapter, read_adapter_config
from megatron_paint.config.settings import EvaluateSettings, ModelSettings, Settings

AnySettings = TypeVar("AnySettings", Settings, EvaluateSettings)
TEMPLATE_FILE = "chat_template.jinja"


def with_local_model(settings: AnySettings) -> AnySettings:
    """The settings with folders for `model`: models on the hub are found in its cache or downloaded.

    If hf_path is a PEFT adapter, it becomes adapter_path, and hf_path the base that the adapter names. A chat template
    that the adapter brings is used unless another one is set. A second call changes nothing. UserError: a model cannot
    be found, or the adapter and its base have different tokens.
    """
    model, prompts = _local(settings.model), settings.prompts
    if model.adapter_path is not None:
        with about("model.adapter_path"):
            _check_tokens(Path(model.adapter_path), Path(model.hf_path))
            if prompts.chat_template is None:
                template = _other_template(Path(model.adapter_path), Path(model.hf_path))
                prompts = dataclasses.replace(prompts, chat_template=template)
    return dataclasses.replace(settings, model=model, prompts=prompts)


def _local(model: ModelSettings) -> ModelSettings:
    with about("model.hf_path"):
        base, adapter = _folder(model.hf_path), model.adapter_path
        if is_adapter(base):
            if adapter is not None:
                raise UserError(f"{base} is a PEFT adapter, and model.adapter_path names another: give its base here")
            base, adapter = base_of(base), base
    if adapter is not None:
        with about("model.adapter_path"):
            adapter = _folder(adapter)
            if not (Path(adapter) / ADAPTER_CONFIG).is_file():
                raise UserError(f"{adapter} is not a PEFT adapter: it has no {ADAPTER_CONFIG}")
            if model.megatron_path is not None:
                raise UserError("model.megatron_path would replace the weights that the adapter belongs to; set one")
    return dataclasses.replace(model, hf_path=base, adapter_path=adapter)


def base_of(adapter: str | Path) -> str:
    """The folder of the model that an adapter belongs to. UserError: its config names none, or it is not here."""
    config = read_adapter_config(adapter)
    if not config.base:
        raise UserError(f"{adapter} is a PEFT adapter that names no base; {_GIVE_BASE.format(adapter=adapter)}")
    base = local_folder(config.base, revision=config.revision)
    if not (base / "config.json").is_file():
        what = "does not exist here" if not base.exists() else "is not a Hugging Face model (it has no config.json)"
        raise UserError(f"{adapter} is a PEFT adapter of {base}, which {what}; {_GIVE_BASE.format(adapter=adapter)}")
    return str(base)


_GIVE_BASE = "give the folder of its base: model.hf_path=BASE model.adapter_path={adapter}, or evaluate --base BASE"


def _folder(name: str) -> str:
    folder = local_folder(name)
    return name if folder == Path(name) else str(folder)


def _check_tokens(adapter: Path, base: Path) -> None:
    """UserError if an adapter brings a tokenizer with tokens that the base's would cut into pieces."""
    ours, theirs = _read(adapter / "tokenizer.json"), _read(base / "tokenizer.json")
    if ours and theirs and (more := sorted(_added(ours).items() - _added(theirs).items())):
        raise UserError(
            f"the tokenizer in {adapter} has the token {more[0][0]!r} with the id {more[0][1]}, which that of its base "
            f"{base} does not have: merge the adapter with PEFT and save it with its tokenizer"
        )


def _other_template(adapter: Path, base: Path) -> str | None:
    """The file of an adapter's chat template, if it differs from that of the base. UserError: it is in no file."""
    template = _template(adapter)
    if template is None or template.strip() == (_template(base) or "").strip():
        return None
    if not (adapter / TEMPLATE_FILE).is_file():
        raise UserError(
            f"{adapter / 'tokenizer_config.json'} has another chat template than {base}: save it as a file, and set "
            "prompts.chat_template to this file"
        )
    return str(adapter / TEMPLATE_FILE)


def _added(tokenizer: Any) -> dict[str, int]:
    return {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}


def _template(folder: Path) -> str | None:
    """The chat template of a folder's tokenizer, as transformers finds it: the file first, then the config."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    found = (_read(folder / "tokenizer_config.json") or {}).get("chat_template")
    return found if isinstance(found, str) else None


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again") from None
    return content
