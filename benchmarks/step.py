"""Measures a complete step of on-policy self-distillation against TRL's SDFTTrainer, in alternating rounds.

    python benchmarks/step.py --trl PYTHON --tokenizer FOLDER --problems math.jsonl
        [--rows 16] [--tokens 64] [--top-p 0.95,1] [--objective opsd] [--rounds 3] [--threads 2]

PYTHON is the interpreter of an environment with torch, trl and datasets. The model is a Qwen3 of 42 million random
weights in float32, with the vocabulary of 151,936 and the tokenizer of FOLDER. Its logits have a standard deviation of
6, so a nucleus of 0.95 has tens of tokens, as that of a trained model. Both engines start from it and train on the same
problems: the first short ones of the file that have a solution.

* `product`: this checkout, with everything that a step of a run does: sampling, reveal, the teacher's pass, the
  student's pass, the optimiser, metrics and samples on disk.
* `trl`: `SDFTTrainer` with `distillation_mode="full_logits"`, `teacher_model_kind="base"`, one generation for each
  prompt and no gradient checkpointing, which is off in `product` too.

Both use the same prompts (TRL's own template), temperature 1, forward KL over the complete vocabulary without a clip,
AdamW, and the same number of new tokens for each prompt: the benchmark stops if a response is shorter. The teacher is a
copy of the initial weights in both.

Each engine has its own process, so that its peak memory is its own. The first round is warm-up; the figures are the
best of the other rounds. CPU seconds are those of the engine's process. A thread that waits uses CPU time too, so CPU
seconds of a busy machine are comparable with `--threads 1` only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from random_model import make_full_vocabulary_model
from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
VOCABULARY = 151_936
SPREAD = 6.0
REQUEST = "Please reason step by step, and put your final answer within \\boxed{}."
PHASES = ("rollout", "mask", "teacher", "student", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A process that trains one step for each line of its standard input."""

    name: str
    process: subprocess.Popen

    def ask(self, line: str = "step") -> str:
        """SystemExit: the process has ended."""
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended with status {self.process.wait()}")
        return answer

    def step(self) -> dict:
        return json.loads(self.ask())


def start(name: str, python: str, work: dict, *, path: str) -> Engine:
    threads = str(work["threads"])
    process = subprocess.Popen(
        [python, str(HERE / f"step_{name}.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": threads, "TRL_EXPERIMENTAL_SILENCE": "1"},
        cwd=work["folder"],  # else the checkout that holds the benchmark could be imported
    )
    engine = Engine(name=name, process=process)
    engine.ask(json.dumps(work))
    return engine


def make_model(folder: Path, tokenizer: Path) -> None:
    """The random model, with the tokenizer's files. It never samples a stop token."""
    from safetensors.torch import load_file, save_file

    make_full_vocabulary_model(str(folder), spread=SPREAD)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    known = AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for token in (known.eos_token_id, known.pad_token_id):
        # Their logits are 0, where the largest of the others is about 25.
        weights["model.embed_tokens.weight"][token] = 0.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_problems(source: Path, target: Path, count: int) -> None:
    """The first problems that have a solution and no drawing, and are short."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    chosen = [
        {key: row[key] for key in ("id", "problem", "solution", "answer")}
        for row in rows
        if 0 < len(row.get("solution", "")) < 1000 and len(row["problem"]) < 600 and "[asy]" not in row["problem"]
    ][:count]
    if len(chosen) < count:
        raise SystemExit(f"{source} has {len(chosen)} short problems with a solution, and --rows is {count}")
    target.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


def compare(work: dict, options: argparse.Namespace) -> None:
    """Prints a line for each engine, and where the product's time goes."""
    pythons = {"product": sys.executable} | ({"trl": options.trl} if options.trl else {})
    paths = {"product": f"{HERE}{os.pathsep}{HERE.parent}", "trl": str(HERE)}
    engines = [start(name, python, work, path=paths[name]) for name, python in pythons.items()]
    rounds: dict[str, list[dict]] = {engine.name: [] for engine in engines}
    for number in range(options.rounds + 1):
        for engine in engines:
            found = engine.step()
            check(found, work, engine.name, step=number + 1)
            if number:  # the first round is warm-up
                rounds[engine.name].append(found)
    for engine in engines:
        engine.process.stdin.close()
        engine.process.wait()
    print(
        f"\n{work['rows']} problems x {work['tokens']} tokens, {work['objective']}, top_p {work['top_p']:g}, "
        f"{work['threads']} threads, float32\n\n"
        "| engine | s a step | CPU s a step | peak GB | loss of each step |\n|---|---:|---:|---:|---|"
    )
    for name, found in rounds.items():
        seconds, cpu_seconds, peak = best(found)
        losses = ", ".join(f"{each['loss']:.2f}" for each in found)
        print(f"| {name} | {seconds:.1f} | {cpu_seconds:.1f} | {peak / 1e9:.2f} | {losses} |")
    if "trl" in rounds:
        ratios = (own / other for own, other in zip(best(rounds["product"]), best(rounds["trl"]), strict=True))
        print(f"| product / trl | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} | |")
    phases = {phase: min(each["phases"][phase] for each in rounds["product"]) for phase in PHASES}
    print("product, s: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in phases.items()), flush=True)


def best(found: list[dict]) -> tuple[float, float, float]:
    """Seconds and CPU seconds of the fastest round, and the peak of all of them."""
    return (
        min(each["seconds"] for each in found),
        min(each["cpu_seconds"] for each in found),
        max(each["peak"] for each in found),
    )


def check(found: dict, work: dict, name: str, *, step: int) -> None:
    """SystemExit: the engine did something else than one step on complete responses."""
    expected = {"step": step, "lengths": [work["tokens"], work["tokens"]]}
    if "logits" in found:
        expected["logits"] = [work["rows"], work["tokens"], VOCABULARY]
    wrong = {key: found[key] for key, value in expected.items() if found[key] != value}
    if wrong:
        raise SystemExit(f"{name} returned {wrong}; expected {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="the interpreter of TRL's environment; without it, no engine `trl`")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json and tokenizer_config.json")
    parser.add_argument("--problems", type=Path, required=True, help="JSON lines: id, problem, solution, answer")
    parser.add_argument("--objective", choices=("opsd", "paint"), default="opsd")
    parser.add_argument("--top-p", type=lambda text: [float(part) for part in text.split(",")], default=[0.95, 1.0])
    for name, default in {"rounds": 3, "rows": 16, "tokens": 64, "threads": torch.get_num_threads()}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, problems = Path(folder) / "model", Path(folder) / "problems.jsonl"
        make_model(model, options.tokenizer)
        write_problems(options.problems, problems, options.rows)
        for top_p in options.top_p:
            work = {
                "folder": folder,
                "model": str(model),
                "problems": str(problems),
                "request": REQUEST,
                "rows": options.rows,
                "tokens": options.tokens,
                "top_p": top_p,
                "objective": options.objective,
                "threads": options.threads,
                "lr": 1e-5,
                "clip_grad": 1.0,
            }
            compare(work, options)


if __name__ == "__main__":
    main()
