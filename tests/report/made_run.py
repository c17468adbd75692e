"""Run folders made by hand, with the tokenizer of the quickstart: what a report shows of them is known."""

import base64
import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_paint.base.json_text import to_json
from megatron_paint.config.saved import to_yaml
from megatron_paint.config.settings import DataSettings, ModelSettings, RunSettings, Settings
from megatron_paint.config.tree import settings_tree
from megatron_paint.records import Asked, EvalReport, Graded
from megatron_paint.run.folder import RunFolder

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"
IDS = {"\n": 6, "\\boxed{": 9, "}": 10, "=": 11, "+": 12, "-": 13, "?": 14} | {str(n): 15 + n for n in range(10)}
END = 2
LOG = """
==== 2026-11-29 23:47:26 UTC, node1: megatron-paint train paint.yaml
23:47:24  model      299,776 weights, 2 layers
23:47:24  memory     training 18 MB a rank
23:47:24             sampling 7 MB a rank
23:47:48  step 1/3  loss 0.0337  overlap 0.43
23:47:49  warning: the first warning
23:47:50  step 2/3  loss 0.0326  overlap 0.51
23:47:51  Stopped after step 2 by SIGTERM; the same command with run.resume=auto continues from it

==== 2026-11-29 23:50:00 UTC, node2: megatron-paint train paint.yaml run.resume=auto
23:50:10  step 3/3  loss 0.0306  overlap 0.58
23:50:11  warning: the second warning
"""


def ids_of(text: str) -> list[int]:
    """The tokens of a text of the quickstart's vocabulary, and the token that ends it."""
    ids = []
    while text:
        piece = next(piece for piece in ("\\boxed{", text[0]) if text.startswith(piece))
        ids.append(IDS[piece])
        text = text.removeprefix(piece)
    return [*ids, END]


def sample(step: int, number: int, **changes: Any) -> dict[str, Any]:
    """A line of samples/ of three tokens a number; overlap, reveal and loss follow from step and number."""
    text = changes.pop("text", f"4{number}+8=5{number}\n\\boxed{{5{number}}}")
    ids = ids_of(text)
    reference = f"4{number}+8=5{number + 1}\n\\boxed{{5{number + 1}}}"
    return {
        "id": f"problem-{number}",
        "step": step,
        "sample": 0,
        "domain": "math",
        "student_prompt_ids": ids_of(f"4{number}+8?"),
        "teacher_prompt_ids": ids_of(f"4{number}+8?{reference}"),
        "response_ids": ids,
        "response_text": text,
        "finished": number != 1,
        "overlap": number / 4,
        "anchors": [
            {"text": f"5{number + 1}", "kind": "boxed", "found": False},
            {"text": f"4{number}", "kind": "number", "found": True},
        ],
        "reveal": {
            "share": 1 - number / 5,
            "shown_tokens": 5,
            "total_tokens": len(reference),
            "shown_text": reference[:5],
            "reference_text": reference,
        },
        "loss": 0.125 * (step + number),
        "selected": [2, 5],
        "advantage": None,
        "correct": number == 0,
        "sampler_gap": {"largest": 1e-6, "position": 2, "total": 3e-6, "above": 0},
        "divergence": [round(0.01 * index, 4) for index in range(len(ids))],
        "student_entropy": [round(0.5 + 0.01 * index, 4) for index in range(len(ids))],
        "teacher_entropy": [round(0.6 - 0.01 * index, 4) for index in range(len(ids))],
        "student_top": {"ids": [[15, 16]] * len(ids), "probabilities": [[0.75, 0.125]] * len(ids)},
        "teacher_top": {"ids": [[17, 15]] * len(ids), "probabilities": [[0.5, 0.25]] * len(ids)},
        **changes,
    }


def group_sample(step: int, number: int, *, size: int = 4, **changes: Any) -> dict[str, Any]:
    """A line of samples/ of GRPO: groups of `size`; the first response of a group is right."""
    place = number % size
    nothing = {"overlap": None, "reveal": None, "anchors": [], "selected": []}
    own = {"id": f"problem-{number // size}", "sample": place, "correct": place == 0, "reward": float(place == 0)}
    line = sample(step, place) | nothing | own | {"advantage": (3 if place == 0 else -1) / 2} | changes
    teacher = ("divergence", "teacher_entropy", "teacher_top", "teacher_prompt_ids")
    return {name: value for name, value in line.items() if name not in teacher}


def metrics(step: int) -> dict[str, Any]:
    """A line of metrics.jsonl: the step takes 2 seconds, of which its phases take 1.5."""
    return {
        "step": step,
        "loss": 1 / step,
        "num_tokens": 100,
        "overlap/mean": 0.25 * step,
        "reveal/mean": 1.0 - 0.2 * step,
        "entropy/student_mean": 0.5,
        "entropy/teacher_mean": 0.125,
        "grad_norm": 10.0**-step,
        "reward/mean": None,
        "time/student_s": 0.5,
        "time/rollout_s": 1.0,
        "tokens_per_second": 50.0,
        "own/metric": 3 * step,
    }


def evaluation(step: int, right: int) -> EvalReport:
    """Two problems with two answers each, of which `right` are right. The second answer to a problem is cut off."""
    outcomes = ["right"] * right + ["wrong"] * (4 - right)
    answers = tuple(
        Graded(
            problem_id=f"held-{index // 2}",
            sample_index=index % 2,
            response_text=f"so it is \\boxed{{{index}}}",
            num_tokens=3 + index,
            finished=index % 2 == 0,
            outcome=outcome,
            extracted=str(index),
        )
        for index, outcome in enumerate(outcomes)
    )
    share = right / 4
    found = {
        "avg": share,
        "avg/low": share - 0.25,
        "avg/high": share + 0.25,
        "truncated_share": 0.0,
        "length_mean": 3.0,
    }
    return EvalReport(
        step=step,
        benchmark="held_out",
        num_problems=2,
        samples_per_problem=2,
        metrics=found,
        answers=answers,
        problems=tuple(Asked(id=f"held-{n}", problem=f"4{n}+1-1?", answer=f"4{n}") for n in range(2)),
    )


def make_run(path: Path, *, steps: int = 3, samples: int = 4, log: str = LOG, **settings: Any) -> Path:
    """A run folder of `steps` steps with `samples` samples each. settings: those of the section run."""
    folder = RunFolder(path)
    chosen = Settings(
        model=ModelSettings(hf_path=str(MODEL)),
        data=DataSettings(train="train.jsonl"),
        run=RunSettings(dir=str(path), steps=3, **settings),
    )
    path.mkdir(parents=True, exist_ok=True)
    folder.config_file.write_text(to_yaml(settings_tree(chosen)))
    for step in range(1, steps + 1):
        folder.append_metrics(metrics(step))
        folder.write_samples(step, [sample(step, number) for number in range(samples)])
    for step, right in ((0, 1), (3, 3)):
        file = path / "eval" / f"step_{step:06d}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(to_json(asdict(evaluation(step, right))))
    folder.logs.mkdir(exist_ok=True)
    (folder.logs / "console.log").write_text(log)
    return path


def decode(text: str) -> Any:
    """The content of a page of samples."""
    return json.loads(zlib.decompress(base64.b64decode(text)))


def read_block(page: str, name: str) -> Any:
    """The strict JSON of a script block of the page."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    start = page.index(f'<script type="application/json" id="{name}">')
    text = page[page.index(">", start) + 1 : page.index("</script>", start)]
    assert "<" not in text
    return json.loads(text, parse_constant=refuse)
