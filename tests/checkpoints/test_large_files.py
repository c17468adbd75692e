"""Reading safetensors files."""

import json
import os
import struct

from megatron_paint.checkpoints.hf_reader import SINGLE, HuggingFaceReader


def test_a_file_larger_than_the_memory_is_opened(tmp_path):
    """Only its header is read. Linux refuses a private map of so many bytes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows = 2 * memory // 2048
    header = json.dumps({"a.weight": {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": [0, rows * 2048]}})
    with open(tmp_path / SINGLE, "wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header.encode())
        stream.truncate(8 + len(header) + rows * 2048)  # a hole: it takes no room on the disk
    reader = HuggingFaceReader(tmp_path)
    assert reader.tensors["a.weight"].shape == (rows, 1024)
    assert reader("a.weight", rows=slice(rows - 1, rows)).sum() == 0
    reader.close()
