"""Pages of samples and answers: inside the report's file while they fit, otherwise as files in a folder beside it.

A page is JSON, compressed by zlib and written in base64, which a browser takes apart itself. Beside the report a page
is a script of one call, because a browser that has opened a file from disk reads other files only as scripts.
"""

import base64
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import orjson

from megatron_paint.base.errors import UserError
from megatron_paint.base.json_text import to_json
from megatron_paint.runtime.files import NewFolder

# Of pages in the report's file. With curves and scripts, 100 steps of 32 samples stay below 5 MB.
MOST_INLINE_BYTES = 3_500_000
PAGE_FILE = re.compile(r"r\d+_e?\d+_\d+\.js")  # e: of the answers of an evaluation
LEVEL = 3  # of zlib: a quarter of the time of 6, for 12 % more bytes


def encode(content: Any) -> str:
    """The text of a page, which consists of letters, digits, +, / and =."""
    try:
        text = orjson.dumps(content)  # NaN and infinities become null
    except TypeError:  # half of a character, or an integer of more than 64 bits
        text = json.dumps(json.loads(to_json(content))).encode("ascii")
    return base64.b64encode(zlib.compress(text, LEVEL)).decode("ascii")


class PageStore:
    """Takes the pages of a report one by one."""

    def __init__(self, out: Path, *, budget: int) -> None:
        self.inline: dict[str, str] = {}
        self.bytes_beside = 0
        self._budget = budget
        self._inline_bytes = 0
        self._path = out.with_name(f"{out.stem}_files")
        self._folder: NewFolder | None = None
        self._check_replaceable()

    def add(self, key: str, encoded: str) -> None:
        """Keeps a page. The first one that does not fit moves all of them into the folder."""
        if self._folder is None:
            self.inline[key] = encoded
            self._inline_bytes += len(encoded)
            if self._inline_bytes <= self._budget:
                return
            self._folder = NewFolder(self._path)
            self._folder.begin()
            for moved, text in self.inline.items():
                self._write(moved, text)
            self.inline = {}
            return
        self._write(key, encoded)

    def finish(self) -> Path | None:
        """The complete folder of the pages, None if the report's file holds them. A folder of before is replaced."""
        if self._folder is None:
            if self._path.is_dir():
                shutil.rmtree(self._path)
            return None
        self._folder.finish(mark=False)
        return self._path

    def _write(self, key: str, encoded: str) -> None:
        text = f'paint.receivePage("{key}","{encoded}");\n'
        self.bytes_beside += len(text)
        (self._folder.unfinished / f"{key}.js").write_text(text, encoding="ascii")

    def _check_replaceable(self) -> None:
        """UserError: the folder has other files than pages of a report."""
        if not self._path.exists():
            return
        others = [] if self._path.is_dir() else [self._path.name]
        if self._path.is_dir():
            others = [entry.name for entry in self._path.iterdir() if not PAGE_FILE.fullmatch(entry.name)]
        if others:
            raise UserError(
                f"--out: {self._path} would be replaced by the samples of the report, but it holds {others[0]}; give "
                "another --out, or remove it"
            )
