"""Conversions for use from Python. `megatron-paint convert` does the same with a progress bar."""

from pathlib import Path
from typing import Literal

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.hf_writer import SHARD_BYTES
from megatron_paint.checkpoints.megatron_folder import megatron_folder
from megatron_paint.checkpoints.peft import is_adapter
from megatron_paint.convert.to_hf import ToAdapter, ToHuggingFace
from megatron_paint.convert.to_megatron import ToMegatron
from megatron_paint.convert.work import Job, convert, processes_for

DType = Literal["bfloat16", "float16", "float32"]


def convert_to_megatron(
    source: str | Path,
    out: str | Path,
    *,
    dtype: DType | None = None,
    checksums: bool = True,
    processes: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the Megatron checkpoint `out` of the Hugging Face folder `source`. Any layout can load it.

    dtype: of all weights; None keeps the types of the source. checksums: write the SHA-256 of each tensor. processes:
    None takes one per core, at most 8, fewer for a small model; with more than one, call it under
    `if __name__ == "__main__":`. overwrite: replace `out` after the new checkpoint is complete.
    `out` is complete or does not exist, and an interrupted call is resumed by the same call. UserError: the source is
    not a complete Qwen3, `out` exists, or the disk refuses.
    """
    check_folder(Path(source))
    job = ToMegatron(source=Path(source), dtype=dtype, checksums=checksums)
    _convert(job, Path(out), processes=processes, overwrite=overwrite)


def convert_to_hf(
    source: str | Path,
    out: str | Path,
    *,
    base: str | Path,
    lora: Literal["merged", "adapter"] = "merged",
    dtype: DType | None = None,
    shard_bytes: int = SHARD_BYTES,
    checksums: bool = True,
    processes: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the Hugging Face folder `out` of the Megatron checkpoint `source`, for `transformers` and vLLM.

    base: the Hugging Face folder with the config, tokenizer and chat template. lora: "merged" adds adapters to the
    weights, "adapter" writes a PEFT folder of the adapters alone. dtype: None takes the types of the weights in `base`,
    or the type in its config. shard_bytes: largest file; it does not apply to adapters, and neither does `checksums`.
    The other parameters, and errors, are those of `convert_to_megatron`.
    """
    source, base = Path(source), Path(base)
    for folder in (source, base):
        check_folder(folder)
    source = megatron_folder(source)
    job: Job
    if lora == "adapter":
        job = ToAdapter(source=source, base=base, dtype=dtype)
    else:
        job = ToHuggingFace(source=source, base=base, dtype=dtype, shard_bytes=shard_bytes, checksums=checksums)
    _convert(job, Path(out), processes=processes, overwrite=overwrite)


def check_folder(path: Path) -> None:
    """UserError unless the path is a folder with something other than a PEFT adapter."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give the folder of a checkpoint")
    if is_adapter(path):
        raise UserError(
            f"{path} is a PEFT adapter, which is not converted: train and evaluate read it as it is; to merge it, give "
            "the checkpoint of its run to convert to-hf, or use PEFT (merge_and_unload)"
        )


def _convert(job: Job, out: Path, *, processes: int | None, overwrite: bool) -> None:
    total = sum(task.nbytes for task in job.tasks())
    convert(job, out, processes=processes_for(total, processes), overwrite=overwrite)
