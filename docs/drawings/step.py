"""Draws the time line of one PAINT step. `python docs/drawings/step.py` writes step.svg."""

from svg import Drawing

LANES = {"stage 0": 152, "stage 1": 226}
NOTES = 112  # y of the notes to the phases
LANE_HEIGHT = 56
UNIT = 31  # pixels for one forward pass of a micro-batch
# Phase: first pixel, last pixel, title, key in metrics.jsonl
PHASES = (
    (96, 300, "Rollout", "time/rollout_s"),
    (306, 404, "Mask", "time/mask_s"),
    (410, 554, "Teacher pass", "time/teacher_s"),
    (560, 952, "Student pass", "time/student_s"),
    (958, 1076, "Optimiser", "time/optimizer_s"),
)
# Start and length in units, by stage: forward passes F and backward passes B of three micro-batches.
TEACHER = {"stage 0": (("F1", 0, 1), ("F2", 1, 1), ("F3", 2, 1)), "stage 1": (("F1", 1, 1), ("F2", 2, 1), ("F3", 3, 1))}
STUDENT = {
    "stage 0": (("F1", 0, 1), ("F2", 1, 1), ("B1", 4, 2), ("F3", 6, 1), ("B2", 7, 2), ("B3", 10, 2)),
    "stage 1": (("F1", 1, 1), ("B1", 2, 2), ("F2", 4, 1), ("B2", 5, 2), ("F3", 7, 1), ("B3", 8, 2)),
}


def passes(drawing: Drawing, plan: dict, start: float) -> None:
    """The micro-batches of both stages from pixel `start`."""
    for stage, blocks in plan.items():
        for name, begin, length in blocks:
            kind = "warm" if name.startswith("B") else "box"
            drawing.box(start + begin * UNIT, LANES[stage] + 8, length * UNIT - 3, LANE_HEIGHT - 16, name, kind=kind)


def draw() -> Drawing:
    """The complete drawing."""
    drawing = Drawing("Time line of one PAINT step", width=1100, height=446)
    drawing.text(24, 24, "One step of PAINT on one replica with two pipeline stages", kind="head left")
    for first, last, title, key in PHASES:
        drawing.frame(first, 44, last - first, 246, "")
        drawing.text((first + last) / 2, 62, title, kind="name")
        drawing.text((first + last) / 2, 82, key)
    for lane, y in LANES.items():
        drawing.text(86, y + LANE_HEIGHT / 2, lane, kind="small end")
    drawing.text(198, NOTES + 10, "token by token, all", "rollouts of a batch together")
    for token in range(3):
        x = 106 + token * 64
        drawing.box(x, LANES["stage 0"] + 8, 28, LANE_HEIGHT - 16, f"t{token + 1}")
        drawing.box(x + 32, LANES["stage 1"] + 8, 28, LANE_HEIGHT - 16, f"t{token + 1}")
    drawing.text(355, NOTES + 10, "on rank 0")
    drawing.box(318, LANES["stage 0"] + 4, 74, LANE_HEIGHT - 8, "", "overlap,", "reveal", kind="good")
    drawing.text(355, LANES["stage 1"] + 28, "the other", "ranks wait")
    drawing.text(482, NOTES + 10, "forward, no", "gradient")
    passes(drawing, TEACHER, 420)
    drawing.text(
        756,
        NOTES + 10,
        "Megatron's 1F1B schedule; the last stage computes",
        "the loss in F; at the end: sum over replicas",
    )
    passes(drawing, STUDENT, 572)
    drawing.text(1017, NOTES + 10, "norm, clip,", "update")
    for stage in ("stage 0", "stage 1"):
        drawing.box(970, LANES[stage] + 8, 94, LANE_HEIGHT - 16, "step", kind="good")
    drawing.arrow((96, 308), (1076, 308))
    drawing.text(586, 324, "time, not to scale")
    drawing.text(
        24,
        386,
        "F1, B1: forward and backward pass of micro-batch 1, packed rows of at most data.micro_batch_tokens tokens.",
        "Every replica runs as many micro-batches as the others. Empty ones are a row of padding and have no loss.",
        "The teacher pass keeps the hidden states of the response rows on the last stage; the student pass reads them.",
        "With objective.reveal.hidden_nats, the teacher scores the solutions after the mask, in one more forward pass.",
        "GRPO grades on rank 0 instead of the mask; then up to updates_per_batch times: student pass, optimiser.",
        kind="small left",
    )
    return drawing


if __name__ == "__main__":
    draw().write(__file__)
