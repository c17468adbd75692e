"""Measures time (against `cp -r`) and memory of the converter on full-size checkpoints of random weights, both ways.

    python benchmarks/convert.py FOLDER [--sizes 0.6b,1.7b,8b] [--json convert.json]

FOLDER is on the measured disk and needs room for three copies of the largest size (50 GB for 8b). Everything written
there is deleted. Each time is that of one command and a `sync`, so the copy and the conversion both end on disk. With
root rights, the page cache is dropped before each command and then has only the program. Otherwise the cache has what
the last command left; the first line says so. Memory is the sampled peak of the resident memory, of the largest process
of a command and of all its processes together.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_paint.checkpoints.dtypes import row_blocks
from megatron_paint.checkpoints.hf_writer import RowWriter, begin_files, lay_out, write_index
from megatron_paint.models.qwen3.mapping import hugging_face_shapes
from megatron_paint.models.qwen3.shape import read_shape

ROOT = Path(__file__).resolve().parents[1]
COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}
SIZES = {
    "0.6b": {"hidden": 1024, "ffn": 3072, "layers": 28, "heads": 16, "tied": True},
    "1.7b": {"hidden": 2048, "ffn": 6144, "layers": 28, "heads": 16, "tied": True},
    "8b": {"hidden": 4096, "ffn": 12288, "layers": 36, "heads": 32, "tied": False},
    # 8b with a third of its layers: it shows whether memory grows with their number.
    "8b-12-layers": {"hidden": 4096, "ffn": 12288, "layers": 12, "heads": 32, "tied": False},
}
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The figures of one command."""

    size: str
    command: str
    gigabytes: float
    seconds: float  # wall time, including `sync`
    ratio: float  # to the copy of the same source
    process_mib: float  # peak of the largest process
    together_mib: float  # peak of all processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", default="0.6b,1.7b,8b")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"page cache: {'dropped before each command' if can_drop() else 'not dropped between the commands'}")
    print("| size | command | GB | s | / cp -r | MiB of a process | MiB together |\n|---|---|---:|---:|---:|---:|---:|")
    rows: list[Measured] = []
    for size in options.sizes.split(","):
        for measured in measure_size(size, options.folder / size):
            rows.append(measured)
            print(
                f"| {size} | {measured.command} | {measured.gigabytes:.1f} | {measured.seconds:.1f} "
                f"| {measured.ratio:.2f} | {measured.process_mib:.0f} | {measured.together_mib:.0f} |",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def measure_size(size: str, folder: Path):
    """Yields the figures of each command and deletes its output."""
    shutil.rmtree(folder, ignore_errors=True)
    source, out = folder / "hf", folder / "out"
    write_checkpoint(source, **SIZES[size])
    convert = [sys.executable, str(ROOT / "tools" / "convert_qwen3.py")]
    ways = {
        "to-megatron": [*convert, "to-megatron", str(source), str(out), "--quiet"],
        "to-hf": [*convert, "to-hf", str(folder / "megatron"), str(out), "--base", str(source), "--quiet"],
    }
    for way, command in ways.items():
        read = Path(command[3])
        copied = timed(["cp", "-r", str(read), str(out)])
        gigabytes = sum(path.stat().st_size for path in out.iterdir()) / 1e9
        shutil.rmtree(out)
        rows = {"cp -r": copied, f"{way} --no-checksums": None, way: None}
        for name in rows:
            if rows[name] is None:
                rows[name] = timed([*command, "--no-checksums"] if name != way else command)
                if way == "to-megatron" and name == way:
                    out.rename(folder / "megatron")
                else:
                    shutil.rmtree(out)
            seconds, one, together = rows[name]
            label = f"cp -r for {way}" if name == "cp -r" else name
            yield Measured(
                size=size,
                command=label,
                gigabytes=gigabytes,
                seconds=seconds,
                ratio=seconds / copied[0],
                process_mib=one / 2**20,
                together_mib=together / 2**20,
            )
    shutil.rmtree(folder)


def write_checkpoint(folder: Path, *, hidden: int, ffn: int, layers: int, heads: int, tied: bool) -> None:
    """Writes random bfloat16 weights into files of at most 5 GB, in blocks of rows."""
    folder.mkdir(parents=True)
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    config = COMMON | sizes | {"num_attention_heads": heads, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    layout = lay_out({n: (torch.bfloat16, shape) for n, shape in hugging_face_shapes(read_shape(folder)).items()})
    begin_files(folder, layout)
    writer, generator = RowWriter(folder, layout), torch.Generator().manual_seed(0)
    noise = torch.randn(2**25, generator=generator).mul_(0.02).to(torch.bfloat16)
    for name, place in layout.places.items():
        for rows in row_blocks(place.shape):
            count = (rows.stop - rows.start) * (place.nbytes // 2 // place.shape[0])
            start = int(torch.randint(len(noise), (1,), generator=generator))
            values = noise.roll(start).repeat(-(-count // len(noise)))[:count]
            writer.write(name, rows.start, values.view(-1, *place.shape[1:]))
    writer.close()
    write_index(folder, layout)


def timed(command: list[str]) -> tuple[float, int, int]:
    """Runs a command and `sync`. Returns (seconds, peak bytes of the largest process, peak bytes of all together)."""
    os.sync()
    if can_drop():
        DROP_CACHES.write_text("1")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", "import megatron_paint.cli.convert"], env=environment, check=True)
    one = together = 0
    start = time.perf_counter()
    running = subprocess.Popen(command, env=environment)
    while running.poll() is None:
        found = [resident(pid) for pid in tree(running.pid)]
        one, together = max(one, *(peak for peak, _ in found), 0), max(together, sum(now for _, now in found))
        time.sleep(0.02)
    if running.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {running.returncode}")
    os.sync()
    return time.perf_counter() - start, one, together


def tree(pid: int) -> list[int]:
    try:
        children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [pid, *(descendant for child in children for descendant in tree(child))]


def resident(pid: int) -> tuple[int, int]:
    """Returns (peak, current) bytes of a process's resident memory; zeros if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return found.get("VmHWM", 0), found.get("VmRSS", 0)


def can_drop() -> bool:
    return os.access(DROP_CACHES, os.W_OK)


if __name__ == "__main__":
    main()
