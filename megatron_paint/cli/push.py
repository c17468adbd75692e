"""`megatron-paint push FOLDER OWNER/NAME`: uploads an export to the Hugging Face hub. Without --yes it only prints."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.hub import UNKNOWN_BASE
from megatron_paint.checkpoints.peft import ADAPTER_CONFIG, ADAPTER_FILE, MODEL_FILES
from megatron_paint.checkpoints.run_state import RUN_STATE

CARD, CONFIG = "README.md", "config.json"
MANIFEST = "conversion.json"  # of convert; checkpoints/manifest.py has the name too, but imports torch
MOST_OF_A_REASON = 300  # characters of what the hub answers
UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B"))


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of an upload."""

    name: str  # in the repository, with slashes
    path: Path
    content: bytes | None = None  # replaces that of the file, in the upload alone

    @property
    def nbytes(self) -> int:
        """The size of what is uploaded."""
        return self.path.stat().st_size if self.content is None else len(self.content)


def run(options: argparse.Namespace, _: list[str]) -> int:
    """Prints what the upload does, and with --yes uploads. UserError: the folder or the hub does not allow it."""
    check_name(options.repository)
    files = with_base(files_of(options.folder), options.base)
    message = options.message or f"Upload {options.folder.resolve().name}"
    for line in summary(files, options.repository, private=options.private, message=message):
        print(line)
    if options.base is None and _names_no_base(files):
        print("The card names no base. --base OWNER/NAME gives its name on the hub.")
    if not options.yes:
        print("Nothing was uploaded. Add --yes to upload.")
        return 0
    print(f"Uploaded: {upload(files, options.repository, private=options.private, message=message)}")
    return 0


def check_name(repository: str) -> None:
    """UserError unless the text is a name that the hub accepts: OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository!r} is no name on the hub: {' '.join(str(error).split())}") from None
    if "/" not in repository:
        raise UserError(f"{repository!r} has no owner: give OWNER/NAME, such as team/{repository}")


def files_of(folder: Path) -> list[File]:
    """The files of an export, in order of their names; hidden files and the manifest of a conversion stay here.

    UserError: the folder is not an export.
    """
    complete = (folder / CONFIG).is_file() and any((folder / name).is_file() for name in MODEL_FILES)
    if not complete and not ((folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_FILE).is_file()):
        raise UserError(f"{folder} is not an exported model{_near(folder)}")
    if not (folder / CARD).is_file():
        raise UserError(f"{folder} has no model card: write {folder / CARD}, which says what was trained and on what")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder) for path in paths]
    return [
        File(name=name.as_posix(), path=path)
        for name, path in zip(names, paths, strict=True)
        if not any(part.startswith(".") for part in name.parts) and name.as_posix() != MANIFEST
    ]


def _near(folder: Path) -> str:
    exports = sorted((folder / "hf").glob("step_*")) if folder.is_dir() else []
    if exports:
        return f": it is a run folder; give its newest export, {exports[-1]}"
    if (folder / RUN_STATE).is_file():
        return f": it is a checkpoint; export it first: megatron-paint convert to-hf {folder} NEW_FOLDER --base MODEL"
    return f": give a folder with {CONFIG} and safetensors files, or with {ADAPTER_CONFIG} and {ADAPTER_FILE}"


def with_base(files: list[File], base: str | None) -> list[File]:
    """The files, with the base's name on the hub in the card and in the config of an adapter.

    UserError: an adapter names a folder of this machine as its base, and no name on the hub is given.
    """
    if base is not None:
        check_name(base)
        return [_named(file, base) for file in files]
    for file in files:
        if file.name == ADAPTER_CONFIG:
            named = str(_read_config(file.path).get("base_model_name_or_path"))
            if Path(named).is_absolute() or Path(named).exists():
                raise UserError(
                    f"{file.path} names the base as {named}, a folder of this machine: give --base OWNER/NAME, its "
                    "name on the hub"
                )
    return files


def _names_no_base(files: list[File]) -> bool:
    """Whether there is a card of an export whose base was a local folder."""
    texts = [file.path.read_text(encoding="utf-8", errors="replace") for file in files if file.name == CARD]
    return any("* Base: a local folder" in text and "\nbase_model:" not in text for text in texts)


def _named(file: File, base: str) -> File:
    if file.name == ADAPTER_CONFIG:
        config = _read_config(file.path)
        if config.get("revision") and config.get("base_model_name_or_path") != base:
            config["revision"] = None  # it is a commit of the other repository
        config["base_model_name_or_path"] = base
        return replace(file, content=(json.dumps(config, indent=2) + "\n").encode())
    if file.name == CARD:
        from huggingface_hub import ModelCard
        from yaml import YAMLError  # of the library that huggingface_hub reads the head with

        try:
            card = ModelCard(file.path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
        except (OSError, ValueError, YAMLError) as error:
            raise UserError(f"{file.path} is not a model card: {error}") from error
        before, card.data.base_model = card.data.base_model, base
        text = str(card)
        for name in (before, UNKNOWN_BASE):
            text = text.replace(f'from_pretrained("{name}")', f'from_pretrained("{base}")')
        return replace(file, content=text.encode())
    return file


def _read_config(path: Path) -> dict[str, object]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not the config of an adapter: it is no JSON object")
    return config


def summary(files: list[File], repository: str, *, private: bool, message: str) -> Iterator[str]:
    """The lines about an upload: where, what, and how much."""
    kind = "private" if private else "public"
    yield f"Model https://huggingface.co/{repository}: created as {kind} if it does not exist; one commit, {message!r}"
    width = max(len(file.name) for file in files)
    for file in files:
        changed = "  (with the base's name on the hub)" if file.content is not None else ""
        yield f"  {file.name:<{width}}  {size_text(file.nbytes):>9}{changed}"
    yield f"{count_text(len(files), 'file')}, {size_text(sum(file.nbytes for file in files))}"


def size_text(nbytes: int) -> str:
    """A size with three digits: 1.23 GB."""
    unit, name = next((unit, name) for unit, name in UNITS if nbytes >= unit or unit == 1)
    return f"{nbytes} B" if unit == 1 else f"{nbytes / unit:.3g} {name}"


def upload(files: list[File], repository: str, *, private: bool, message: str) -> str:
    """Creates the model if it does not exist, adds one commit, and returns its address.

    UserError: the hub refuses, or the model exists and is public although `private` was asked for.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE forbids an upload: unset it, or run the command on a machine with the hub")
    api = HfApi(library_name="megatron_paint")
    if get_token() is None:
        raise UserError("no token for the hub was found: run hf auth login, or set HF_TOKEN to a token that may write")
    operations = [
        CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content or str(file.path)) for file in files
    ]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:  # it existed before
            raise UserError(
                f"{repository} exists and is public, but --private was given; nothing was uploaded. Make it private in "
                "its settings on the hub, give another name, or leave out --private"
            )
        commit = api.create_commit(repository, operations, commit_message=message)
    except UserError:
        raise
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:MOST_OF_A_REASON] or type(error).__name__
        raise UserError(f"{repository}: the hub refused the upload ({reason}); the same command tries again") from None
    except Exception as error:  # the HTTP library has other errors
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise UserError(f"{repository}: the hub cannot be reached ({type(error).__name__}); try again") from None
    return commit.commit_url
