"""The engine `product` of step.py: complete training steps of this checkout, in a process of their own.

The first line of standard input describes the work. Each further line asks for one step. Each line is answered by one
line of JSON.
"""

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from step_memory import peak_bytes

from megatron_paint.config.load import settings_of
from megatron_paint.config.settings import Settings
from megatron_paint.run.folder import RunFolder

STEPS = 100  # more than are asked for


def settings_for(work: dict, folder: str) -> Settings:
    """The loss of TRL's trainer: forward KL over the complete vocabulary at temperature 1, without a clip."""
    student, teacher = Path(folder) / "student.jinja", Path(folder) / "teacher.jinja"
    student.write_text(f"{{{{ problem }}}}\n\n{work['request']}", encoding="utf-8")
    teacher.write_text(f"{{{{ problem }}}}\n\n{work['request']}\n\n{{{{ solution }}}}", encoding="utf-8")
    return settings_of(
        {
            "model": {"hf_path": work["model"], "dtype": "float32"},
            "data": {"train": work["problems"], "problems_per_step": work["rows"], "check_answers": False},
            "prompts": {
                "student_template": str(student),
                "teacher_template": str(teacher),
                "student_thinking": False,
                "teacher_thinking": False,
            },
            "objective": {
                "name": work["objective"],
                "loss": {"divergence": "forward_kl", "temperature": 1.0, "clip": None},
                "teacher": {"weights": "initial"},
            },
            "rollout": {
                "max_new_tokens": work["tokens"],
                "temperature": 1.0,
                "top_p": work["top_p"],
                "top_k": 0,
            },
            "optimizer": {"lr": work["lr"], "clip_grad": work["clip_grad"]},
            "run": {"dir": str(Path(folder) / "run"), "steps": STEPS, "save_every": STEPS},
        }
    )


def recorded(folder: RunFolder) -> dict:
    """What the run folder has about its last step."""
    metrics = folder.read_metrics()[-1]
    lengths = [len(line["response_ids"]) for line in folder.read_samples(metrics["step"])]
    return {
        "step": metrics["step"],
        "loss": metrics["loss"],
        "lengths": [min(lengths), max(lengths)],
        "phases": {key.removeprefix("time/").removesuffix("_s"): metrics[key] for key in metrics if "time/" in key},
    }


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    work = json.loads(sys.stdin.readline())
    with ExitStack() as stack:
        settings = settings_for(work, stack.enter_context(tempfile.TemporaryDirectory()))
        from megatron_paint.mcore.ranks import joined_ranks

        ranks = stack.enter_context(joined_ranks(settings.megatron))
        import torch

        from megatron_paint.runtime.stop import StopRequest
        from megatron_paint.training.ownership import owned_run
        from megatron_paint.training.start import prepare

        torch.set_num_threads(work["threads"])
        run = prepare(
            settings,
            ranks,
            None,
            partial(owned_run, settings, ranks, lock=None, log=None),
            mode="quiet",
            prints_plan=False,
            stack=stack,
            request=stack.enter_context(StopRequest()),
        )
        print("ready", file=answers, flush=True)
        for step, _ in enumerate(sys.stdin, start=1):
            start, cpu_start = time.perf_counter(), time.process_time()
            run.step(step)
            found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
            print(json.dumps(found | {"peak": peak_bytes()} | recorded(run.folder)), file=answers, flush=True)


if __name__ == "__main__":
    main()
