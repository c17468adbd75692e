"""A cache of huggingface_hub with a model in it, as a download leaves it."""

import hashlib
from pathlib import Path

REVISION = "5f0d2c3b8a7e6d9c1b4a3f2e1d0c9b8a7f6e5d4c"


def put(cache: Path, name: str, folder: Path, *, revision: str = REVISION, branch: str = "main") -> Path:
    """Lays a folder out as the hub's model `name`: contents under blobs, links to them in the snapshot."""
    model = cache / f"models--{name.replace('/', '--')}"
    for part in ("blobs", "refs", f"snapshots/{revision}"):
        (model / part).mkdir(parents=True, exist_ok=True)
    (model / "refs" / branch).write_text(revision)
    for file in folder.iterdir():
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        (model / "blobs" / digest).write_bytes(content)
        (model / "snapshots" / revision / file.name).symlink_to(f"../../blobs/{digest}")
    return model / "snapshots" / revision
