"""The engine `trl` of step.py: steps of TRL's SDFTTrainer, in a process of their own. It runs in TRL's environment.

The first line of standard input describes the work. Each further line asks for one step. Each line is answered by one
line of JSON.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from step_memory import peak_bytes
from transformers import AutoTokenizer, Qwen3ForCausalLM, TrainerCallback
from trl.experimental.sdft import SDFTConfig, SDFTTrainer, sdft_trainer

LOSS = "compute_full_logit_self_distillation_loss"


class OneStepAtATime(TrainerCallback):
    """Waits before each step for a line of standard input, and answers after the step."""

    def __init__(self, answers, shapes: list[list[int]]) -> None:
        self.answers, self.shapes = answers, shapes

    def on_step_begin(self, args, state, control, **others) -> None:
        if not sys.stdin.readline():
            sys.exit()
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **others) -> None:
        seconds, cpu_seconds = time.perf_counter() - self.start, time.process_time() - self.cpu_start
        self.found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak": peak_bytes(), "step": state.global_step}

    def on_log(self, args, state, control, logs, **others) -> None:
        if "loss" in logs:
            lengths = [logs["completions/min_length"], logs["completions/max_length"]]
            found = self.found | {"loss": logs["loss"], "lengths": lengths, "logits": self.shapes.pop()}
            print(json.dumps(found), file=self.answers, flush=True)


def record_shapes() -> list[list[int]]:
    """The shapes of the logits that the loss is called with from now on."""
    shapes, loss = [], getattr(sdft_trainer, LOSS)

    def recorded(student_logits: torch.Tensor, teacher_logits: torch.Tensor, **options) -> torch.Tensor:
        assert student_logits.shape == teacher_logits.shape
        shapes.append(list(student_logits.shape))
        return loss(student_logits, teacher_logits, **options)

    setattr(sdft_trainer, LOSS, recorded)
    return shapes


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    work = json.loads(sys.stdin.readline())
    torch.set_num_threads(work["threads"])
    rows = [json.loads(line) for line in Path(work["problems"]).read_text(encoding="utf-8").splitlines()]
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{row['problem']}\n\n{work['request']}"}],
                "privileged_context": row["solution"],
            }
            for row in rows
        ]
    )
    settings = SDFTConfig(
        output_dir=work["folder"] + "/trl",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # TRL's default computes the layers twice
        per_device_train_batch_size=work["rows"],
        num_generations=1,
        max_completion_length=work["tokens"],
        max_prompt_length=None,
        temperature=1.0,
        top_p=work["top_p"],
        top_k=0,
        distillation_mode="full_logits",
        distillation_alpha=0.0,  # forward KL
        teacher_model_kind="base",
        chat_template_kwargs={"enable_thinking": False},
        learning_rate=work["lr"],
        max_grad_norm=work["clip_grad"],
        lr_scheduler_type="constant",
        num_train_epochs=1000,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SDFTTrainer(
        model=Qwen3ForCausalLM.from_pretrained(work["model"], dtype=torch.float32),
        args=settings,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(work["model"]),
        callbacks=[OneStepAtATime(answers, record_shapes())],
    )
    print("ready", file=answers, flush=True)
    trainer.train()


if __name__ == "__main__":
    main()
