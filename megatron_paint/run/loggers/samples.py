"""The table of samples that loggers get."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_paint.records import StepReport
from megatron_paint.run.loggers.interface import SampleTable

SAMPLES = 16  # rows of a table; ours
CHARACTERS = 2000  # of a text; the samples of the run folder are complete
COLUMNS = ("id", "sample", "domain", "correct", "finished", "overlap", "reveal", "advantage", "loss", "tokens")
TEXTS = ("problem", "shown to the teacher", "response")


def sample_table(report: StepReport, lines: Sequence[Mapping[str, Any]]) -> SampleTable:
    """The first samples of a step. lines: those of `sample_lines`, in the order of the samples."""
    rows = []
    for sample, line in list(zip(report.samples, lines, strict=True))[:SAMPLES]:
        known = {**line, "reveal": sample.reveal and sample.reveal.share, "tokens": len(sample.response_ids)}
        shown = sample.reveal.shown_text if sample.reveal is not None else ""
        texts = (sample.problem.problem, shown, line["response_text"])
        rows.append((*(known.get(name) for name in COLUMNS), *map(_shortened, texts)))
    return SampleTable(columns=COLUMNS + TEXTS, rows=rows)


def _shortened(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} ... ({len(text):,} characters)"
