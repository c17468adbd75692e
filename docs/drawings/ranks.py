"""Draws which rank holds what. `python docs/drawings/ranks.py` writes ranks.svg."""

from svg import Drawing

RANKS = {0: ((0, 1), (4, 5)), 1: ((2, 3), (6, 7))}  # replica -> stage -> tensor-parallel ranks, in Megatron's order
REPLICA_X = {0: 24, 1: 596}
REPLICA_WIDTH = 480
STAGE_Y = (160, 352)
HELD = (
    ("{half} of the embedding", "layers 1 to L/2: {half}", "of heads and MLP"),
    ("layers L/2+1 to L: {half}", "of heads and MLP", "{half} of the output layer"),
)


def replica(drawing: Drawing, number: int) -> None:
    """Two stages, one above the other, with two tensor-parallel ranks each."""
    x = REPLICA_X[number]
    drawing.frame(x, 126, REPLICA_WIDTH, 366, f"Replica {number}: half of the samples")
    for stage, y in enumerate(STAGE_Y):
        drawing.text(x + 20, y + 10, f"Stage {stage}", kind="small left")
        for tensor in (0, 1):
            lines = [line.format(half=f"half {tensor + 1}") for line in HELD[stage]]
            drawing.box(x + 14 + tensor * 252, y + 22, 200, 92, f"rank {RANKS[number][stage][tensor]}", *lines)
        middle = y + 68
        drawing.arrow((x + 216, middle), (x + 264, middle), both=True)
        drawing.text(x + 240, middle - 14, "TP")
    down, up = x + 104, x + 376
    drawing.arrow((down, 275), (down, 372))
    drawing.text(down + 10, 314, "hidden states", "[T, 1, H]", kind="small left")
    drawing.arrow((up, 372), (up, 275))
    drawing.text(up - 10, 314, "their gradient", "(student pass)", kind="small end")
    drawing.arrow((x + REPLICA_WIDTH / 2, 492), (x + REPLICA_WIDTH / 2, 516))


def draw() -> Drawing:
    """The complete drawing."""
    drawing = Drawing("Which rank holds what", width=1100, height=700)
    drawing.text(24, 24, "8 ranks = 2 replicas x 2 pipeline stages x 2 tensor-parallel ranks", kind="head left")
    drawing.box(
        24,
        44,
        1052,
        46,
        "Every rank: all problems, rollouts and samples of the step",
        "Rank 0 alone reads data, runs masker and grader, and writes metrics. It sends the results to all ranks.",
        kind="plain",
    )
    for number in (0, 1):
        drawing.arrow(
            (REPLICA_X[number] + REPLICA_WIDTH / 2, 90),
            (REPLICA_X[number] + REPLICA_WIDTH / 2, 126),
        )
        replica(drawing, number)
    for y in STAGE_Y:
        drawing.arrow((504, y + 68), (596, y + 68), both=True)
        drawing.text(550, y + 54, "DP")
    for number in (0, 1):
        drawing.box(
            REPLICA_X[number],
            516,
            REPLICA_WIDTH,
            46,
            "Loss, on the last stage",
            "each rank: its vocabulary half; two collectives for each chunk",
            kind="good",
        )
        drawing.arrow((REPLICA_X[number] + 240, 562), (REPLICA_X[number] + 240, 584))
    drawing.box(
        24,
        584,
        1052,
        46,
        "Scores of all samples, gathered to every rank; one optimiser step",
        "The gradient is summed over the replicas and divided once by the global number of tokens that carry loss.",
        kind="plain",
    )
    drawing.text(
        24,
        662,
        "TP: sums within each layer (under sequence parallelism: gather and scatter of tokens).",
        "DP: sum of the gradients; the distributed optimiser gives each replica a part of the optimiser's state.",
        kind="small left",
    )
    return drawing


if __name__ == "__main__":
    draw().write(__file__)
