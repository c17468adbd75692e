"""Measures how long training waits for a checkpoint, with and without `run.async_save`, and how a write slows steps.

    python benchmarks/checkpoint.py [--layers 8] [--rounds 5] [--folder FOLDER]

One process trains a Qwen3 of random weights in float32 with AdamW and an initial teacher. A round has steps alone, a
save that blocks, and a save with steps until its file `complete` exists. The figures are medians over the rounds.
"""

import argparse
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from random_model import make_model

from megatron_paint.config.settings import DataSettings, ModelSettings, RunSettings, Settings
from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.losses.objectives import DistillationLoss
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.records import Problem, Rollout, Sample

VOCABULARY = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder for the checkpoints (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make_model(f"{folder}/model", vocabulary=VOCABULARY, layers=options.layers)
        settings = Settings(
            model=ModelSettings(hf_path=f"{folder}/model", dtype="float32"),
            data=DataSettings(train="none"),
            run=RunSettings(dir="none"),
        )
        ranks = start_ranks(settings.megatron)
        from megatron_paint.mcore.policy import MegatronPolicy

        policy = MegatronPolicy(settings, read_shape(settings.model.hf_path), ranks)
        measure(policy, Path(folder) / "checkpoint", rounds=options.rounds)
        stop_ranks()


def measure(policy, checkpoint: Path, *, rounds: int) -> None:
    loss = DistillationLoss(config=InterpolationLossConfig(), chunk_bytes=1e8, token_temperature=1.1)
    samples = make_samples(4, tokens=96)

    def step() -> None:
        policy.update(samples, loss, lr=1e-6)

    waited, copied, alone, beside, written = [], [], [], [], []
    step()
    for _ in range(rounds):
        alone += [seconds(step) for _ in range(3)]
        shutil.rmtree(checkpoint, ignore_errors=True)
        waited.append(seconds(lambda: (policy.save(checkpoint, {"step": 1}), policy.finish_save(wait=True))))
        shutil.rmtree(checkpoint)
        begun = time.perf_counter()
        copied.append(seconds(lambda: policy.save(checkpoint, {"step": 1})))
        while not policy.finish_save(wait=False):
            beside.append(seconds(step))
        written.append(time.perf_counter() - begun)
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    wait, copy, pace = (statistics.median(times) for times in (waited, copied, alone))
    print(f"checkpoint of {size / 1e9:.2f} GB; a step alone takes {pace:.2f} s")
    print("| | seconds | ratio |\n|---|---:|---:|")
    print(f"| training waits, async_save: false | {wait:.2f} | 1 |")
    print(f"| training waits, async_save: true | {copy:.2f} | {copy / wait:.3f} |")
    print(f"| until the checkpoint is complete, with steps during the write | {statistics.median(written):.2f} | |")
    slowed = statistics.median(beside)
    print(f"| a step during the write | {slowed:.2f} | {slowed / pace:.2f} of alone |")


def seconds(act) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def make_samples(count: int, *, tokens: int) -> list[Sample]:
    draw = random.Random(0)
    samples = []
    for index in range(count):
        prompt, response = (tuple(draw.randrange(VOCABULARY) for _ in range(n)) for n in (40, tokens))
        samples.append(
            Sample(
                problem=Problem(id=str(index), problem="", solution="", answer=""),
                key=index,
                rollout=Rollout(problem_id=str(index), prompt_ids=prompt, response_ids=response),
                teacher_prompt_ids=prompt[::-1],
            )
        )
    return samples


if __name__ == "__main__":
    main()
