"""Draws docs/planner.svg: what the planner expects from 8 to 1,024 GPUs. `python tools/planner_curves.py [FILE]`

Everything in it is the planner's model of time. Nothing was measured.
"""

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "planner"  # the same file each time

from matplotlib import pyplot as plt  # noqa: E402

from megatron_paint.planning.search.question import Asked, question_of  # noqa: E402
from megatron_paint.planning.search.search import Found, search  # noqa: E402

FILE = Path(__file__).parents[1] / "docs" / "planner.svg"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
PROBLEMS = 1024  # of a step, whatever the number of GPUs
MODELS = ("qwen3_8b", "qwen3_14b", "qwen3_32b", "qwen3_30b_a3b", "qwen3_235b_a22b")
KINDS = {"products": "products, weights read", "attention": "attention", "memory": "memory traffic", "nvlink": "NVLink"}
KINDS |= {"network": "network", "bubble": "pipeline bubble", "host": "host"}


def best(model: str, gpus: int) -> Found:
    """PAINT with all weights on H100."""
    asked = Asked(model=model, gpus=gpus, gpu="h100-80", problems_per_step=PROBLEMS, engine="vllm", sampling_gpus=gpus)
    return search(question_of(asked), top=1)


def main(file: Path) -> None:
    """Computes the curves and writes the drawing."""
    figure, (seconds, shares) = plt.subplots(1, 2, figsize=(11, 4.6))
    found = {model: {gpus: best(model, gpus) for gpus in GPUS} for model in MODELS}
    for model, by_gpus in found.items():
        points = {gpus: result.ranked[0] for gpus, result in by_gpus.items() if result.ranked}
        if not points:
            print(f"{model}: no layout is accepted or fits; it is left out")
            continue
        seconds.plot(list(points), [planned.time.total for planned in points.values()], marker="o", label=model)
    seconds.set(xscale="log", yscale="log", xlabel="GPUs that train (as many sample)", ylabel="seconds a step")
    seconds.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
    seconds.set_title("The fastest layout that fits")
    seconds.legend(loc="upper right", fontsize="small")
    points = {gpus: result.ranked[0].time for gpus, result in found["qwen3_32b"].items() if result.ranked}
    bottom = [0.0] * len(points)
    for kind, label in KINDS.items():
        values = [time.by_kind()[kind] / sum(time.by_kind().values()) for time in points.values()]
        shares.bar([str(gpus) for gpus in points], values, bottom=bottom, label=label)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    shares.set(xlabel="GPUs that train", ylabel="share of the time, sampling included")
    shares.set_title("Where the time of qwen3_32b goes")
    shares.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(f"A model, not measured. PAINT, all weights, {PROBLEMS:,} problems a step, vLLM, H100 80 GB")
    figure.tight_layout()
    figure.savefig(file, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(" `")[0])
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, default=FILE, help="default: docs/planner.svg")
    main(parser.parse_args().file)
