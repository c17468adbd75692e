"""Draws the states of a run on Slurm. `python docs/drawings/slurm_states.py` writes slurm_states.svg."""

from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1100, 590
COLUMNS = (145, 430, 715, 985)  # centres
ROWS = (70, 260, 455)
BOX_WIDTH, BOX_HEIGHT = 178, 70
LINE = 16  # between two lines of text

STYLE = """
  .back { fill: #ffffff } .box { fill: #eef3fb; stroke: #35587f } .good { fill: #e6f5e9; stroke: #2f7d46 }
  .bad { fill: #fdecea; stroke: #b3372b } .edge { stroke: #4a4a4a; fill: none } .tip { fill: #4a4a4a }
  .name { fill: #111111; font-weight: bold; font-size: 15px } .small { fill: #333333; font-size: 12.5px }
  text { font-family: Helvetica, Arial, sans-serif; text-anchor: middle }
  .left { text-anchor: start } .end { text-anchor: end }
  .box, .good, .bad, .edge { stroke-width: 1.5 } .dashed { stroke-dasharray: 6 4 }
  @media (prefers-color-scheme: dark) {
    .back { fill: #0d1117 } .box { fill: #16233a; stroke: #7ea6d9 } .good { fill: #12301c; stroke: #63bd7d }
    .bad { fill: #3a1714; stroke: #e5837a } .edge { stroke: #b5b5b5 } .tip { fill: #b5b5b5 }
    .name { fill: #f2f2f2 } .small { fill: #cfcfcf }
  }
"""


@dataclass(frozen=True)
class State:
    """A box at a column and a row."""

    name: str
    lines: tuple[str, ...]
    column: int
    row: int
    kind: str = "box"

    @property
    def x(self) -> int:
        return COLUMNS[self.column]

    @property
    def y(self) -> int:
        return ROWS[self.row]

    def side(self, which: str, shift: int = 0) -> tuple[int, int]:
        """The middle of a side, moved along that side by `shift`."""
        if which in ("left", "right"):
            return self.x + (BOX_WIDTH // 2) * (1 if which == "right" else -1), self.y + shift
        return self.x + shift, self.y + (BOX_HEIGHT // 2) * (1 if which == "bottom" else -1)


QUEUED = State("Queued", ("the job waits for nodes,", "one job of a run at a time"), 0, 0)
PREFLIGHT = State("Preflight", ("checks every node",), 1, 0)
TRAINING = State("Training", ("resumes from the", "newest checkpoint"), 2, 0)
DONE = State("Done", ("exit status 0,", "cancels queued jobs"), 3, 0, "good")
NEXT = State("Next attempt", ("the job is requeued, or", "the next job of the run"), 0, 1)
ENDED = State("Attempt ended", ("the script decides",), 1, 1)
SAVED = State("Stopped", ("after its step,", "with a checkpoint"), 2, 1)
FAILED = State("Failed", ("exit status 1, reason in", "RUN/STOPPED"), 1, 2, "bad")
CANCELLED = State("Not requeued", ("exit status 143, the", "checkpoint stays"), 2, 2, "bad")
STATES = (QUEUED, PREFLIGHT, TRAINING, DONE, NEXT, ENDED, SAVED, FAILED, CANCELLED)


def text(x: float, y: float, lines: tuple[str, ...], kind: str = "small") -> str:
    """Lines of text around a centre; `left` starts them at x."""
    top = y - LINE * (len(lines) - 1) / 2 + 4
    return "\n".join(
        f'<text class="{kind}" x="{x:g}" y="{top + LINE * number:g}">{escape(line)}</text>'
        for number, line in enumerate(lines)
    )


def box(state: State) -> str:
    """A state with its name and what happens in it."""
    left, top = state.x - BOX_WIDTH // 2, state.y - BOX_HEIGHT // 2
    frame = f'<rect class="{state.kind}" x="{left}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="9"/>'
    half = LINE * len(state.lines) / 2
    return "\n".join(
        (frame, text(state.x, state.y - half, (state.name,), "name"), text(state.x, state.y + LINE / 2, state.lines))
    )


def arrow(*points: tuple[int, int], dashed: bool = False, tip: bool = True) -> str:
    """A line through points; with a tip at the last one."""
    path = " ".join(f"{x},{y}" for x, y in points)
    end = ' marker-end="url(#tip)"' if tip else ""
    return f'<polyline class="edge{" dashed" if dashed else ""}" points="{path}"{end}/>'


def edges() -> list[str]:
    """All transitions with their labels."""
    bottom = HEIGHT - 62
    outside = 24
    to_queued = ((outside, bottom), (outside, QUEUED.y), QUEUED.side("left"))
    return [
        arrow(QUEUED.side("right"), PREFLIGHT.side("left")),
        text(287, 42, ("Slurm starts", "the job")),
        arrow(PREFLIGHT.side("right"), TRAINING.side("left")),
        text(572, 42, ("every check", "passed")),
        arrow(TRAINING.side("right"), DONE.side("left")),
        text(850, 34, ("all steps,", "nothing due")),
        arrow(PREFLIGHT.side("bottom", -20), ENDED.side("top", -20)),
        text(PREFLIGHT.x - 28, 160, ("a check failed;", "bad nodes are named"), "small end"),
        arrow(TRAINING.side("bottom", -50), ENDED.side("top", 50)),
        text(545, 155, ("crash",)),
        arrow(TRAINING.side("bottom", 10), SAVED.side("top", 10)),
        text(TRAINING.x + 20, 165, ("USR1 (time limit nearly over)", "or TERM"), "small left"),
        arrow(SAVED.side("left"), ENDED.side("right")),
        arrow(ENDED.side("left"), NEXT.side("right")),
        text(287, 335, ("next: newer checkpoint,", "new bad nodes, or only", "one attempt without")),
        arrow(NEXT.side("top"), QUEUED.side("bottom")),
        text(NEXT.x + 10, 165, ("avoids the", "bad nodes"), "small left"),
        arrow(ENDED.side("bottom"), FAILED.side("top")),
        text(ENDED.x + 10, 358, ("stop: two attempts without a", "newer checkpoint, or exit status 2"), "small left"),
        arrow(SAVED.side("bottom", 40), CANCELLED.side("top", 40)),
        text(SAVED.x + 50, 358, ("TERM from scancel",), "small left"),
        arrow(FAILED.side("bottom"), (FAILED.x, bottom), dashed=True, tip=False),
        arrow(CANCELLED.side("bottom"), (CANCELLED.x, bottom), *to_queued, dashed=True),
        text(230, bottom - 14, ("you launch the run again",)),
        text(
            outside,
            HEIGHT - 24,
            (
                "If the first node dies, the attempt cannot record its end. Slurm then requeues the job: next attempt. "
                "A failed rank first restarts within the job (torchrun).",
            ),
            "small left",
        ),
    ]


def draw() -> str:
    """The complete drawing."""
    tip = (
        '<marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="tip" d="M0,0 L10,5 L0,10 z"/></marker>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-label="States of a run on Slurm">'
    )
    back = f'<rect class="back" width="{WIDTH}" height="{HEIGHT}"/>'
    parts = (head, f"<style>{STYLE}</style>", f"<defs>{tip}</defs>", back, *edges(), *map(box, STATES), "</svg>")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
