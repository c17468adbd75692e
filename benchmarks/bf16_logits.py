"""Measures how rounding logits to bfloat16 changes the loss if the teacher differs little from its student.

    python benchmarks/bf16_logits.py

The logits cover the full vocabulary; the top ones are 24 to 32. The teacher's logits differ by a normal error of
a given size. For each size, the table has the forward KL in float64, from float32 and from bfloat16 logits, and the
cosines of the last two gradients to the exact one. The last line is a lower limit for the self-check: the hidden states
of one model are rounded to bfloat16 in one pass and not in the other, as if two passes over the same tokens summed in
different orders. Axes: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import torch

TOKENS, VOCAB, HIDDEN, TEMPERATURE = 32, 151_936, 256, 1.1


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    student_TV = torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64) * 3.0
    student_TV[:, :20] += torch.linspace(24.0, 14.0, 20, dtype=torch.float64)
    noise_TV = torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    print("| size of the difference | KL, exact | float32 logits | bfloat16 logits | cosine: float32 | bfloat16 |")
    print("|---:|---:|---:|---:|---:|---:|")
    for size in (0.003, 0.01, 0.03, 0.1, 0.3):
        exact, wanted_TV = _kl(student_TV, student_TV + size * noise_TV)
        cells = [f"{size:g}", f"{exact:.2e}"]
        results = [
            _kl(*(part.to(dtype).double() for part in (student_TV, student_TV + size * noise_TV)))
            for dtype in (torch.float32, torch.bfloat16)
        ]
        cells += [f"{value:.2e} ({value / exact:.3g}x)" for value, _ in results]
        cells += [f"{float(_cosine(gradient_TV, wanted_TV)):.4f}" for _, gradient_TV in results]
        print("| " + " | ".join(cells) + " |")
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64) * (3.0 / HIDDEN**0.5)
    floor, _ = _kl(hidden_TH @ weight_VH.T, hidden_TH.bfloat16().double() @ weight_VH.T)
    print(f"\nlower limit from bfloat16 hidden states: {floor:.1e} nats a token")


def _kl(student_TV: torch.Tensor, teacher_TV: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Returns the mean forward KL and its gradient with respect to the student's logits, in float64."""
    log_p_TV = torch.log_softmax(student_TV / TEMPERATURE, 1)
    log_q_TV = torch.log_softmax(teacher_TV / TEMPERATURE, 1)
    q_TV = log_q_TV.exp()
    return float((q_TV * (log_q_TV - log_p_TV)).sum(1).mean()), log_p_TV.exp() - q_TV


def _cosine(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    return (one * two).sum() / (one.norm() * two.norm())


if __name__ == "__main__":
    main()
