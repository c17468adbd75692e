"""The report of an evaluation has the problems beside their answers."""

from types import SimpleNamespace

from megatron_paint.config.settings import EvaluationSettings
from megatron_paint.evaluation.evaluator import Answers, Evaluator
from megatron_paint.grading.graders import Graders
from megatron_paint.records import Asked, Problem, Rollout


def test_a_report_has_the_problems_and_their_reference_answers():
    texts = {(1,): "\\boxed{5}", (2,): "\\boxed{6}", (): ""}
    prompts = SimpleNamespace(response_text=lambda ids: texts[tuple(ids)])
    problems = [Problem(id=id, problem=f"{id}?", solution="", answer=answer) for id, answer in (("a", "5"), ("b", "7"))]
    evaluator = Evaluator(EvaluationSettings(max_new_tokens=4), problems, prompts, seed=1)
    rollouts = [
        Rollout(problem_id=id, prompt_ids=(), response_ids=ids, finished=True) for id, ids in (("a", (1,)), ("b", (2,)))
    ]
    with Graders(workers=1) as graders:
        report = evaluator.report(Answers(sampled=rollouts, greedy=[]), step=3, benchmark="held_out", graders=graders)
    assert report.problems == (Asked(id="a", problem="a?", answer="5"), Asked(id="b", problem="b?", answer="7"))
    assert [answer.outcome for answer in report.answers] == ["right", "wrong"]
