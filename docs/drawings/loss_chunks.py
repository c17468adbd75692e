"""Draws the chunks of the fused loss. `python docs/drawings/loss_chunks.py` writes loss_chunks.svg."""

from svg import Drawing

LEFT, RIGHT = 96, 1076
ROLLOUTS = (("rollout A", 96, 210), ("rollout B", 210, 396), ("rollout C, longer than a chunk", 396, 1076))
CHUNKS = (
    ("chunk 1", 96, 396, "complete rollouts: selection known"),
    ("chunk 2", 396, 736, "a part of C: selection not known yet"),
    ("chunk 3", 736, 1076, "the rest of C"),
)
# Work on this rank: name, lines, first pixel, last pixel, kind; in the order of the code.
WORK = (
    ("1", ("logits,", "statistics"), 96, 172, "box"),
    ("1", ("selection,", "sums"), 238, 314, "warm"),
    ("2", ("logits,", "statistics"), 318, 394, "box"),
    ("1", ("gradient:", "dh, dW"), 398, 474, "good"),
    ("2", ("guess,", "sums"), 478, 554, "warm"),
    ("3", ("logits,", "statistics"), 558, 634, "box"),
    ("2", ("gradient:", "dh, dW"), 638, 714, "good"),
    ("3", ("guess,", "sums"), 718, 794, "warm"),
    ("3", ("gradient:", "dh, dW"), 860, 936, "good"),
    ("redo", ("logits, sums,", "gradient"), 976, 1076, "bad"),
)
GATHER, SUM = "gather {}", "sum {}"
NETWORK = (
    (GATHER, 1, 174, 236),
    (SUM, 1, 318, 394),
    (GATHER, 2, 398, 474),
    (SUM, 2, 558, 634),
    (GATHER, 3, 638, 714),
    (SUM, 3, 796, 858),
    ("sum", "", 1002, 1050),
)


def tokens(drawing: Drawing) -> None:
    """The response tokens of a micro-batch and how they are cut."""
    drawing.text(86, 72, "tokens T", kind="small end")
    for name, first, last in ROLLOUTS:
        drawing.box(first, 56, last - first - 4, 32, "", name, kind="plain")
    for name, first, last, note in CHUNKS:
        drawing.box(first, 98, last - first - 4, 46, name, note)


def time_line(drawing: Drawing) -> None:
    """What one rank computes and what travels meanwhile."""
    drawing.text(86, 224, "this rank", "computes", kind="small end")
    for name, lines, first, last, kind in WORK:
        drawing.box(first, 192, last - first, 64, name, *lines, kind=kind)
    drawing.text(86, 290, "network", kind="small end")
    for name, number, first, last in NETWORK:
        drawing.box(first, 274, last - first, 32, "", name.format(number), kind="plain")
    drawing.arrow((LEFT, 326), (RIGHT, 326))
    drawing.text((LEFT + RIGHT) / 2, 342, "time, not to scale")


def draw() -> Drawing:
    """The complete drawing."""
    drawing = Drawing("Chunks of the fused loss", width=1100, height=560)
    drawing.text(
        24, 24, "The fused loss: logits of one chunk at a time, two collectives for each chunk", kind="head left"
    )
    tokens(drawing)
    drawing.text(
        24, 170, "Vocabulary sharded over tensor-parallel ranks; the numbers are those of the chunks", kind="name left"
    )
    time_line(drawing)
    drawing.text(
        24,
        380,
        "gather: softmax statistics of each rank's columns. They give normalisers, entropies and so the selection.",
        "sum: the divergences, while the next chunk's logits are computed. The next gather overlaps with the gradient.",
        "Together both collectives send at most 60 bytes a token from each rank, 84 with a support.",
        kind="small left",
    )
    drawing.box(
        24,
        424,
        1052,
        114,
        "Redo",
        "Which tokens of C are selected is known only after all of C was seen. Until then all its tokens are treated",
        "as the more frequent case (with fraction 0.1: not selected). Then the tokens for which this was wrong are",
        "computed again, with one collective: their loss and their row of dh are replaced, and dW is corrected.",
        "Cost: 4 (1 + wrong fraction) products with the output layer. Two separate passes would cost 6.",
        kind="bad",
    )
    return drawing


if __name__ == "__main__":
    draw().write(__file__)
