"""Two or three examples below the help of every command."""

import argparse

WIDTH = 110  # of a command with its comment behind it
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {  # command -> (arguments, what they do)
    "": (
        ("quickstart", "a run of a few minutes without a GPU"),
        ("init qwen3_8b paint > my.yaml", "settings to edit"),
        ("train my.yaml --dry-run", "check settings, data and memory"),
    ),
    "train": (
        ("train my.yaml --dry-run", "check everything, print layout and memory, and end"),
        ("train my.yaml", "one rank for each GPU of this machine"),
        ("train my.yaml optimizer.lr=1e-5 run.dir=runs/low --processes 2", "other settings, two ranks"),
    ),
    "search": (
        ("search my.yaml space.yaml --trials 24 --dry-run", "check everything, print the cost"),
        ("search my.yaml space.yaml --trials 24", "run the trials"),
        ("search my.yaml space.yaml --report-only", "the report of the trials so far"),
    ),
    "evaluate": (
        ("evaluate --model /models/Qwen3-8B --benchmarks aime24,aime25 --n 12", "a Hugging Face folder"),
        ("evaluate --model runs/x/checkpoints/step_000100 --benchmarks held_out.jsonl", "a checkpoint of a run"),
        ("evaluate --responses answers.jsonl --benchmarks problems.jsonl", "grade recorded answers"),
    ),
    "compare": (
        ("compare evaluations/base evaluations/paint", "a table in the terminal"),
        ("compare evaluations/base evaluations/paint --out table.md", "also a Markdown file"),
    ),
    "inspect": (
        ("inspect samples runs/x 10", "the first sample of step 10"),
        ("inspect profile runs/x", "where the time of profiled steps went"),
    ),
    "inspect samples": (
        ("inspect samples runs/x 10", "the first sample of step 10"),
        ("inspect samples runs/x 10 --index 3", "the fourth one"),
        ("inspect samples runs/x 10 --id train-0002", "the one of this problem"),
    ),
    "inspect profile": (
        ("inspect profile runs/x", "all profiled steps"),
        ("inspect profile runs/x --step 20 --rank 1 --top 10", "one step, ten operators of rank 1"),
    ),
    "status": (
        ("status runs/x", "step, speed and last checkpoint, also while the run trains"),
        ("status runs/x --json", "for a program"),
    ),
    "report": (
        ("report runs/x", "writes runs/x/report.html"),
        ("report runs/x runs/y --out both.html", "two runs side by side"),
        ("report runs/x --serve", "follows a live run"),
    ),
    "convert": (
        ("convert to-megatron /models/Qwen3-8B /ckpt/qwen3_8b", "for any layout"),
        ("convert to-hf runs/x/checkpoints/step_000100 out --base /models/Qwen3-8B", "for transformers and vLLM"),
        ("convert check /models/Qwen3-8B /ckpt/qwen3_8b", "number by number"),
    ),
    "convert to-megatron": (
        ("convert to-megatron /models/Qwen3-8B /ckpt/qwen3_8b", "in the type of the source"),
        ("convert to-megatron /models/Qwen3-8B /ckpt/qwen3_8b --dtype float32 --overwrite", "another type"),
    ),
    "convert to-hf": (
        ("convert to-hf runs/x/checkpoints/step_000100 out --base /models/Qwen3-8B", "a complete model"),
        ("convert to-hf runs/x/checkpoints/step_000100 out --base /models/Qwen3-8B --lora adapter", "a PEFT folder"),
    ),
    "convert check": (
        ("convert check /models/Qwen3-8B /ckpt/qwen3_8b", "prints the first difference"),
        ("convert check /models/Qwen3-8B /ckpt/qwen3_8b --json", "for a program"),
    ),
    "convert inspect": (
        ("convert inspect /models/Qwen3-8B", "sizes, types and odd findings"),
        ("convert inspect runs/x/checkpoints/step_000100 --json", "for a program"),
    ),
    "launch": (
        ("launch slurm my.yaml --nodes 2 --dry-run", "print the script of a run"),
        ("launch slurm my.yaml --nodes 2 --time 12:00:00 --attempts 4", "submit it as a chain of jobs"),
    ),
    "launch slurm": (
        ("launch slurm my.yaml --nodes 2 --dry-run", "print the script, change nothing"),
        ("launch slurm my.yaml --nodes 2 --account team --partition gpu --time 12:00:00", "submit one job"),
        ("launch slurm my.yaml --nodes 2 --time 12:00:00 --attempts 4", "each attempt resumes the one before"),
    ),
    "launch search": (
        ("launch search my.yaml space.yaml --workers 4 --dry-run", "print the scripts, change nothing"),
        ("launch search my.yaml space.yaml --workers 4 --time 12:00:00", "submit the workers"),
    ),
    "plan": (
        ("plan qwen3_32b --gpus 16 --gpu h100-80", "the fastest layouts"),
        ("plan qwen3_8b --gpus 8 --gpu h100-80 --config my.yaml --yaml best.yaml", "for a settings file; into a file"),
        ("plan --gpu-list", "the known GPUs"),
    ),
    "settings": (
        ("settings", "every setting"),
        ("settings optimizer", "one section"),
        ("settings run.steps --json", "one setting, for a program"),
    ),
    "doctor": (("doctor", "what this machine has and misses"), ("doctor --json", "for a program")),
    "init": (
        ("init --list", "the sizes and objectives"),
        ("init qwen3_8b paint > my.yaml", "a settings file to edit"),
        ("init qwen3_1p7b grpo > my.yaml", "a baseline for a smaller model"),
    ),
    "quickstart": (
        ("quickstart", "trains in the folder quickstart; a second call prints the result"),
        ("quickstart --out /tmp/try --dry-run", "only copies and checks"),
    ),
    "push": (
        ("push runs/x/hf/step_000100 team/paint-8b", "prints what an upload would do"),
        ("push runs/x/hf/step_000100 team/paint-8b --yes --private", "uploads into a private model"),
    ),
}


def add_examples(parser: argparse.ArgumentParser) -> None:
    """Puts the examples below the help of the parser and of all its commands."""
    _add(parser, "")


def _add(parser: argparse.ArgumentParser, name: str) -> None:
    before = f"{parser.epilog}\n\n" if parser.epilog else ""
    parser.epilog = before + _text(EXAMPLES[name])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, inner in action.choices.items():
                _add(inner, f"{name} {command}".strip())


def _text(examples: tuple[tuple[str, str], ...]) -> str:
    commands = [f"  megatron-paint {arguments}" for arguments, _ in examples]
    widest = max(map(len, commands))
    lines = ["examples:"]
    for command, (_, meaning) in zip(commands, examples, strict=True):
        fits = widest + len(meaning) + 4 <= WIDTH
        lines += [f"{command:<{widest}}  # {meaning}"] if fits else [f"  # {meaning}", command]
    return "\n".join(lines)
