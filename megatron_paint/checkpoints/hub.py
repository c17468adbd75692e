"""Models by their name on the Hugging Face hub, such as Qwen/Qwen3-8B: from its cache, or downloaded into it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_paint.base.errors import UserError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SNAPSHOT = re.compile(r"models--(?P<id>.+)/snapshots/(?P<revision>[0-9a-f]+)$")
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model")  # neither .bin files nor other formats
UNKNOWN_BASE = "BASE"  # in the code of a model card that has no name of the base
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


class HubModel(NamedTuple):
    """A model on the hub and one revision of it."""

    id: str
    revision: str


def local_folder(name: str | Path, *, revision: str | None = None) -> Path:
    """Returns the folder of a model that is given as a folder or by its name on the hub.

    A complete copy in the cache of huggingface_hub is used without asking the hub. Otherwise the missing files are
    downloaded, unless HF_HUB_OFFLINE is set. A path that is neither is returned: its reader names what is missing.
    revision: branch, tag or commit on the hub; None: main.
    Raises UserError, with the command that downloads the model, if it cannot be downloaded here.
    """
    path = Path(name)
    if path.exists() or not _ID.fullmatch(str(name)) or Path(path.parts[0]).is_dir():
        return path
    return _cached(str(name), revision) or _download(str(name), revision)


def hub_model(folder: str | Path) -> HubModel | None:
    """Returns the name on the hub of a folder in the cache; None for other folders."""
    found = _SNAPSHOT.search(str(folder))
    return found and HubModel(found["id"].replace("--", "/"), found["revision"])


def _cached(name: str, revision: str | None) -> Path | None:
    """The complete copy of the model in the cache, if there is one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        # huggingface_hub 2 refuses a snapshot without files that no model needs, such as README.md, and names it.
        if (partial := getattr(error, "snapshot_path", None)) is None:
            return None
        folder = Path(partial)
    return folder if not any(_missing(folder)) else None


def _missing(folder: Path) -> Iterator[str]:
    """The files of a model or an adapter that a snapshot does not have. An interrupted download leaves some out."""
    if (folder / "adapter_model.safetensors").exists() and (folder / "adapter_config.json").exists():
        return
    if not (folder / "config.json").exists():
        yield "config.json"
    if not any((folder / file).exists() for file in TOKENIZERS):
        yield "tokenizer.json"
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.exists():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            yield index.name
    yield from (shard for shard in sorted(shards) if not (folder / shard).exists())


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    line = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    where = f"in the cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{name} is no folder, and no complete copy of it is {where}; HF_HUB_OFFLINE forbids a download. On a "
            f"machine with access to the hub and the same cache run: {line}"
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(WANTED)))
    except GatedRepoError:
        raise UserError(
            f"{name}: the hub gives it only to users who accepted its terms: accept them on https://huggingface.co/"
            f"{name}, run hf auth login, then: {line}"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"{name} is neither a folder nor a model on the hub; check its spelling") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} is no folder, no complete copy of it is {where}, and the download failed ({reason}). On a machine "
            f"with access to the hub and the same cache run: {line}; or copy the model and give its folder"
        ) from None
    except Exception as error:  # the HTTP library has other errors
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise UserError(
            f"{name} is no folder, no complete copy of it is {where}, and the hub cannot be reached "
            f"({type(error).__name__}). On a machine with access to the hub and the same cache run: {line}"
        ) from None
