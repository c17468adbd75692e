"""Every key of metrics.jsonl: its meaning, its unit, and the range of a healthy run where one is known.

A new metric has its line here and is computed in `metrics.py` or by its objective. docs/metrics.md is made from this.
"""

from dataclasses import dataclass

KEPT = "PAINT, OPSD with rollout.keep or peer_rollout"
MIXTURE = "mixtures of experts"
GRADED = "GRPO; PAINT, OPSD with rollout.grade, rollout.keep or peer_rollout; all with data.order=adastar"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One key of a line of metrics.jsonl."""

    meaning: str
    unit: str
    healthy: str = "-"  # "-": nothing is known
    only: str = ""  # the objectives or lines that have it, "" for all


METRICS: dict[str, Metric] = {
    "step": Metric(meaning="number of the step, from 1", unit="step"),
    "loss": Metric(
        meaning="mean loss over the tokens that carry loss; 0 without any",
        unit="nats a token; none for GRPO",
        healthy="PAINT, OPSD: well above the floor that the self-check prints (docs/numerics.md)",
    ),
    "num_tokens": Metric(meaning="response tokens of the step", unit="tokens"),
    "loss_tokens": Metric(
        meaning="response tokens that carry loss",
        unit="tokens",
        healthy=(
            "num_tokens; fewer with objective.loss.elsewhere=skip, with GRPO where groups are left out, and where "
            "rollout.keep or peer_rollout leaves responses out"
        ),
    ),
    "overlap/mean": Metric(
        meaning=(
            "share of the anchors of the reference that a response has, mean over responses that are trained on; "
            "if nothing of this problem is shown (none, reference_free, other_example), of the problem's own reference"
        ),
        unit="0 to 1",
        healthy="above 0; at 0 the teacher sees everything, as in OPSD",
        only="PAINT, OPSD",
    ),
    "reveal/mean": Metric(
        meaning=(
            "share of the reference that the reveal rule asks to show, before the cut moves back; mean over responses "
            "that are trained on"
        ),
        unit="0 to 1",
        healthy="PAINT: objective.reveal.minimum to 1; OPSD: 1",
        only="PAINT, OPSD",
    ),
    "anchors/none_share": Metric(
        meaning=(
            "of the responses that are trained on, the share whose reference has no anchor; with "
            "objective.reveal.rule=overlap it is shown completely"
        ),
        unit="0 to 1",
        healthy="near 0",
        only="PAINT, OPSD",
    ),
    "entropy/student_mean": Metric(
        meaning="entropy of the student, mean over response tokens; GRPO: over tokens of groups that are not left out",
        unit="nats",
    ),
    "entropy/teacher_mean": Metric(
        meaning="entropy of the teacher, mean over response tokens", unit="nats", only="PAINT, OPSD"
    ),
    "selected/share": Metric(
        meaning="share of response tokens that are selected for the mixed target",
        unit="0 to 1",
        healthy="positions=top_fraction: objective.loss.fraction or a little more, as each response rounds up; OPSD: 0",
    ),
    "divergence/selected_mean": Metric(
        meaning="divergence without the clip, mean over selected tokens",
        unit="nats a token",
        healthy="well above the floor that the self-check prints (docs/numerics.md)",
        only="PAINT",
    ),
    "divergence/other_mean": Metric(
        meaning=(
            "divergence without the clip, mean over tokens that are not selected; SFT: the cross entropy; GRPO: the KL "
            "to the reference in the first update, null with objective.grpo.kl_weight=0"
        ),
        unit="nats a token",
        healthy="PAINT, OPSD: well above the floor that the self-check prints (docs/numerics.md)",
    ),
    "support/outside_mass": Metric(
        meaning=(
            "mass of the target outside the support before it is cut, mean over response tokens: how much the teacher "
            "reads off the solution"
        ),
        unit="0 to 1",
        only="objective.loss.support",
    ),
    "support/size": Metric(
        meaning="vocabulary entries in the support, mean over response tokens",
        unit="entries",
        only="objective.loss.support",
    ),
    "clip/share": Metric(
        meaning=(
            "target mass on clipped vocabulary entries, mean over tokens that carry loss; clip_rule=token: share of "
            "the gradient that the clip removed"
        ),
        unit="0 to 1",
        healthy="at most 0.2; with a clip of entries the run warns after 10 steps in a row above it",
        only="PAINT, OPSD; 0 for GRPO and SFT",
    ),
    "clip/entries": Metric(
        meaning=(
            "clipped vocabulary entries, mean over tokens that carry loss; clip_rule=token: share of these tokens "
            "whose gradient the clip made smaller"
        ),
        unit="entries a token",
        only="PAINT, OPSD; 0 for GRPO, which has ratio/clipped_share, and for SFT",
    ),
    "response/length_mean": Metric(
        meaning="tokens of a response, mean; SFT: of a solution",
        unit="tokens",
        healthy="steady; growth to rollout.max_new_tokens or a fall to a few tokens may be a collapse",
    ),
    "response/truncated_share": Metric(
        meaning="share of sampled responses that end at rollout.max_new_tokens",
        unit="0 to 1",
        healthy="steady; see response/length_mean",
        only="PAINT, OPSD, GRPO",
    ),
    "response/no_answer_share": Metric(
        meaning="share of sampled responses without a final answer in a closed box; of domains with grader=math",
        unit="0 to 1",
        healthy="below 1; the run warns after 5 steps in a row at 1",
        only="PAINT, OPSD, GRPO",
    ),
    "grad_norm": Metric(
        meaning="norm of the gradient before clipping; GRPO: mean over the updates; null in a step without an update",
        unit="-",
    ),
    "lr": Metric(meaning="learning rate", unit="-", healthy="the schedule of the optimizer settings"),
    "sampler_gap/mean": Metric(
        meaning="mean difference between sampler's and trainer's log-probability of a sampled token",
        unit="nats",
        healthy="float32: below 1e-5; bfloat16: below 0.02",
    ),
    "sampler_gap/above_share": Metric(
        meaning="share of sampled tokens whose log-probabilities differ by more than 0.1 nats",
        unit="0 to 1",
        healthy="float32: 0; bfloat16: below 0.02",
    ),
    "rollout/update_seconds": Metric(
        meaning="time of sending the weights to the servers, before the step samples",
        unit="seconds",
        only="rollout.engine=vllm",
    ),
    "rollout/spot_check_gap": Metric(
        meaning="largest difference between a server's and the trainer's log-probability, in the check after an update",
        unit="nats",
        healthy="float32: below 1e-3; bfloat16: below 0.3",
        only="rollout.engine=vllm",
    ),
    "rollout/steps_behind": Metric(
        meaning="training steps between the weights that sampled a response and those that learn from it, mean",
        unit="steps",
        healthy="0; with rollout.ahead=1, 1 after the first step of a run",
        only="rollout.engine=vllm",
    ),
    "importance/mean": Metric(
        meaning="importance weight of responses that older weights have sampled, mean over response tokens",
        unit="-",
        healthy=(
            "near 1; far below it a step changes the model much, or the servers' numbers differ much from the trainer's"
        ),
        only="PAINT, OPSD with rollout.ahead=1",
    ),
    "importance/limited_share": Metric(
        meaning="of the tokens of responses that older weights have sampled, the share with the largest weight that "
        "rollout.importance_limit allows",
        unit="0 to 1",
        healthy="near 0",
        only="PAINT, OPSD with rollout.ahead=1",
    ),
    "sampler_gap/max": Metric(
        meaning=(
            "largest difference between sampler's and trainer's log-probability of a sampled token; only of responses "
            "of the current weights"
        ),
        unit="nats",
        healthy="about 1e-5 in float32, up to a few tenths in bfloat16",
        only="PAINT, OPSD, GRPO; null for replayed rollouts without log-probabilities",
    ),
    "time/rollout_s": Metric(
        meaning="time for sampling; rollout.ahead=1: for waiting for it, and for scoring", unit="s"
    ),
    "time/mask_s": Metric(meaning="time for overlap and reveal", unit="s"),
    "time/teacher_s": Metric(meaning="time for the passes without gradient", unit="s"),
    "time/student_s": Metric(meaning="time for the student's forward and backward pass", unit="s"),
    "time/optimizer_s": Metric(meaning="time for the optimiser step and the moving average", unit="s"),
    "tokens_per_second": Metric(meaning="response tokens, divided by the time of the complete step", unit="tokens / s"),
    "memory/host_gb": Metric(meaning="peak resident memory of rank 0's process since its start", unit="GB"),
    "memory/device_gb": Metric(
        meaning="peak memory of tensors on rank 0's GPU since the previous step", unit="GB", only="on a GPU"
    ),
    "reward/mean": Metric(
        meaning="share of responses with the right answer; with scores of a function of yours, their mean",
        unit="0 to 1",
        healthy="GRPO: between 0 and 1; at either end every group is left out. PAINT, OPSD: above 0",
        only=GRADED,
    ),
    "reward/timeouts": Metric(
        meaning="responses whose grading ran out of time; they count as wrong",
        unit="responses",
        healthy="0",
        only=GRADED,
    ),
    "reward/errors": Metric(
        meaning="responses on which a grader of yours failed; their reward is 0, and the run warns",
        unit="responses",
        healthy="0",
        only=GRADED,
    ),
    "reward/box_in_thought": Metric(
        meaning="responses that are cut inside a thought which holds a box; grading.box_in_thought decides about them",
        unit="responses",
        healthy="0; more responses need a larger rollout.max_new_tokens",
        only=GRADED,
    ),
    "reward/equal_groups_share": Metric(
        meaning="share of responses in groups that are left out because their rewards are all equal",
        unit="0 to 1",
        healthy="below 1; at 1 the step updates nothing",
        only="GRPO",
    ),
    "updates": Metric(
        meaning="optimiser steps of this step",
        unit="updates",
        healthy="objective.grpo.updates_per_batch; 0 where every group is left out",
        only="GRPO",
    ),
    "ratio/clipped_share": Metric(
        meaning="share of tokens whose gradient the clipped ratio stops, over all updates; 0 in the first update",
        unit="0 to 1",
        only="GRPO",
    ),
    "kl/mean": Metric(
        meaning="estimate (k3) of the KL to the reference, mean over all updates; null with objective.grpo.kl_weight=0",
        unit="nats a token",
        only="GRPO",
    ),
    "time/grade_s": Metric(meaning="time for grading", unit="s", only=GRADED),
    "order/accuracy": Metric(
        meaning="share of right rollouts, a: round(m a^2) of the step's m problems are promoted",
        unit="0 to 1",
        healthy="above 0; near 0 the same problems come again in each step",
        only="data.order=adastar",
    ),
    "order/promoted": Metric(
        meaning="problems of the step that move to the end of the order; the others come again in the next step",
        unit="problems",
        healthy="grows with the accuracy up to data.problems_per_step",
        only="data.order=adastar",
    ),
    "order/oldest_visit": Metric(
        meaning="last visit of the problem that comes next; 0 until all problems have been promoted once",
        unit="step",
        healthy="grows after the first round through the problems",
        only="data.order=adastar",
    ),
    "rollout/kept": Metric(
        meaning="responses that are trained on",
        unit="responses",
        healthy="above 0; the run warns after 5 steps in a row at 0, which update nothing",
        only=KEPT,
    ),
    "rollout/problems_without_correct": Metric(
        meaning="problems without a right response; rollout.keep=correct and shortest_correct leave them out",
        unit="problems",
        healthy="below data.problems_per_step",
        only=KEPT,
    ),
    "reveal/without_peer": Metric(
        meaning=(
            "responses that rollout.keep would keep, but that are left out: no other response to their problem is "
            "right and can be shown"
        ),
        unit="responses",
        healthy="steady; more responses a problem (rollout.samples_per_problem) make it smaller",
        only="objective.reveal.solution=peer_rollout",
    ),
    "experts/tokens_mean": Metric(
        meaning=(
            "tokens that an expert of a layer computes in the student's pass, padding included; mean over experts, "
            "layers and updates"
        ),
        unit="tokens",
        healthy="about (tokens of prompts and responses) x (experts of a token) / (experts of a layer)",
        only=MIXTURE,
    ),
    "experts/tokens_max": Metric(
        meaning="tokens of the busiest expert of any layer; mean over updates",
        unit="tokens",
        healthy="steady",
        only=MIXTURE,
    ),
    "experts/imbalance": Metric(
        meaning="tokens of the busiest expert of a layer, divided by the mean over its experts; mean over layers",
        unit="1 (even) to the experts of a layer",
        healthy="steady; if it grows, ranks wait for the one with most tokens (moe_router_load_balancing_type)",
        only=MIXTURE,
    ),
    "experts/idle_share": Metric(
        meaning="share of experts without a token in the student's pass",
        unit="0 to 1",
        healthy="near 0 where a step has many tokens",
        only=MIXTURE,
    ),
    "router/entropy_mean": Metric(
        meaning="entropy of the routers' probabilities of all experts, mean over tokens and layers",
        unit="nats",
        healthy=(
            "steady. Near 0, all probability is on one expert; near the logarithm of the number of experts, the router "
            "prefers none"
        ),
        only=MIXTURE,
    ),
    "skipped": Metric(
        meaning=(
            "why the step was skipped: a loss or gradient that is not finite, or a gradient norm above "
            "optimizer.grad_norm_skip_threshold; no weight changed"
        ),
        unit="text",
        healthy="absent",
        only="lines of skipped steps, which have only step and skipped",
    ),
}
