"""Models by their name on the hub: a complete copy in the cache, a download, or the command that downloads it."""

import json
import os
import re

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.hub import hub_model, local_folder
from tests.support import hub_cache

NAME = "acme/tiny-1.5_b"
FILES = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": "weights"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; the hub must not be asked."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def write(folder, files=FILES):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def test_a_complete_copy_is_found(cache, tmp_path):
    snapshot = hub_cache.put(cache, NAME, write(tmp_path / "model"))
    found = local_folder(NAME)
    assert found == snapshot
    assert (found / "model.safetensors").read_text() == "weights"
    assert hub_model(found) == (NAME, hub_cache.REVISION)


def test_a_revision_is_found(cache, tmp_path):
    hub_cache.put(cache, NAME, write(tmp_path / "model"))
    other = "0" * 40
    wanted = hub_cache.put(cache, NAME, tmp_path / "model", revision=other, branch="v2")
    assert local_folder(NAME, revision="v2") == wanted
    assert local_folder(NAME, revision=hub_cache.REVISION) == wanted.parent / hub_cache.REVISION


@pytest.mark.parametrize("missing", [*FILES, "all"])
def test_without_a_complete_copy_the_download_line_is_given(missing, cache, tmp_path):
    if missing != "all":
        hub_cache.put(cache, NAME, write(tmp_path / "model", {k: v for k, v in FILES.items() if k != missing}))
    with pytest.raises(UserError, match=re.escape(f"hf download {NAME}") + "$") as caught:
        local_folder(NAME)
    assert str(cache) in str(caught.value)
    assert "HF_HUB_OFFLINE" in str(caught.value)


def test_a_missing_shard_is_noticed(cache, tmp_path):
    shards = {f"model-0000{i}-of-00002.safetensors": "x" for i in (1, 2)}
    index = {"model.safetensors.index.json": json.dumps({"weight_map": {"a": min(shards), "b": max(shards)}})}
    files = {"config.json": "{}", "tokenizer.json": "{}", **index, **shards}
    snapshot = hub_cache.put(cache, NAME, write(tmp_path / "model", files))
    assert local_folder(NAME) == snapshot
    os.unlink(snapshot / max(shards))
    with pytest.raises(UserError, match="no complete copy"):
        local_folder(NAME)


def test_files_that_no_model_needs_may_be_missing(cache, tmp_path, monkeypatch):
    """huggingface_hub 2 knows from its listing that README.md was not downloaded."""
    snapshot = hub_cache.put(cache, NAME, write(tmp_path / "model"))

    class IncompleteSnapshotError(errors.LocalEntryNotFoundError):
        snapshot_path = str(snapshot)

    def download(name, **_):
        raise IncompleteSnapshotError("README.md is missing")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_folder(NAME) == snapshot


def test_an_adapter_needs_no_model(cache, tmp_path):
    files = {"adapter_config.json": "{}", "adapter_model.safetensors": "x"}
    assert hub_cache.put(cache, NAME, write(tmp_path / "adapter", files)) == local_folder(NAME)


def test_a_folder_comes_first(cache, tmp_path):
    folder = tmp_path / NAME
    folder.mkdir(parents=True)
    assert str(local_folder(NAME)) == NAME


@pytest.mark.parametrize("path", ["models/Qwen3", "./a/b", "/a/b", "a", "a/b/c", "~/a", "a b/c"])
def test_other_paths_are_left_to_their_reader(path, cache, tmp_path):
    (tmp_path / "models").mkdir()
    assert str(local_folder(path)) == path.removeprefix("./")


def test_it_is_downloaded(cache, tmp_path, monkeypatch):
    """Files of other formats are left out. The tool downloads the files that the cache does not have."""
    asked = []

    def download(name, *, revision=None, local_files_only=False, allow_patterns=None):
        if local_files_only:
            return real(name, revision=revision, local_files_only=True)
        asked.append((name, revision, allow_patterns))
        return str(tmp_path / "downloaded")

    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert local_folder(NAME, revision="v2") == tmp_path / "downloaded"
    assert asked[0][:2] == (NAME, "v2")
    assert "*.safetensors" in asked[0][2]
    assert not any(pattern in asked[0][2] for pattern in ("*", "*.bin", "*.pth"))


NO_ROUTE = type("ConnectError", (Exception,), {"__module__": "httpx"})  # huggingface_hub 2 uses httpx2, 1 uses httpx


@pytest.mark.parametrize("error", [NO_ROUTE("no route"), OSError("disk full"), errors.OfflineModeIsEnabled("off")])
def test_a_failed_download_is_one_line(error, cache, monkeypatch):
    def download(name, *, local_files_only=False, **_):
        raise errors.LocalEntryNotFoundError("not here") if local_files_only else error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=re.escape(f"hf download {NAME} --revision v2")) as caught:
        local_folder(NAME, revision="v2")
    assert "\n" not in str(caught.value)
