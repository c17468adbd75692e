"""Whole runs whose rollouts come from servers: a stand-in of vLLM with its endpoints and traps, and with faults."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import pytest

from megatron_paint.config.settings import RolloutSettings
from megatron_paint.training.engines import transfer_folder
from tests.support import forked_ranks, tiny
from tests.support.ports import free_port
from tests.support.results import metrics
from tests.support.served_runs import SAMPLES, STEPS, check, samples_of, servers_in
from tests.support.until import until

ROOT = Path(__file__).parents[2]
STAND_IN = f"[{sys.executable},-m,tests.support.vllm_stand_in]"
MODE = 8  # requests that ask a server for its --logprobs-mode, before any other
TP, PP = "tensor_model_parallel_size: 2, sequence_parallel: true", "pipeline_model_parallel_size: 2"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
EXPERT_LAYOUTS = {"ep2": "expert_model_parallel_size: 2", "tp2-ep2": f"{TP}, expert_model_parallel_size: 2"}
LAYOUTS = {"dp2": (2, ""), "tp2": (2, TP), "tp2-pp2": (4, f"{TP}, {PP}")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return tiny.make_model(folder / "model", tied=False), tiny.make_problems(folder / "problems.jsonl")


def write_settings(folder: Path, model: tuple[Path, Path], *, layout: str = "", fault: dict | None = None) -> Path:
    """Settings of a short run with two servers. fault: of the first server that meets it."""
    settings = tiny.make_settings(folder, *model, layout=layout)
    fault = fault and json.dumps(fault | {"marker": str(folder / "marker")})
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **({"STAND_IN_FAULT": fault} if fault else {}),
    }
    ours = f"engine: vllm, transfer_bytes: 20000, vllm: {{servers: 2, hang_timeout_s: 10.0, command: {STAND_IN}"
    text = settings.read_text().replace("rollout: {", f"rollout: {{{ours}, environment: {json.dumps(environment)}}}, ")
    settings.write_text(
        text.replace("steps: 4, save_every: 2, evaluate_every: 2", f"steps: {STEPS}, save_every: 2, evaluate_every: 3")
    )
    return settings


def servers_of(folder: Path) -> list[Path]:
    """The processes whose command names something below the folder."""
    return [
        entry
        for entry in Path("/proc").glob("[0-9]*/cmdline")
        if b"vllm_stand_in" in contents(entry) and str(folder).encode() in contents(entry)
    ]


def contents(entry: Path) -> bytes:
    with suppress(OSError):
        return entry.read_bytes()
    return b""


def transfer_of(run: Path) -> Path:
    return transfer_folder(RolloutSettings(), run)


@pytest.mark.parametrize(
    "layout", [*(pytest.param(name, marks=pytest.mark.long) for name in ("dp2", "tp2")), "tp2-pp2"]
)
def test_a_run(layout, model, tmp_path):
    processes, megatron = LAYOUTS[layout]
    settings = write_settings(tmp_path, model, layout=megatron)
    ended = forked_ranks.train(tmp_path, settings, processes=processes)
    assert ended.statuses == [0] * processes, ended
    check(tmp_path / "run")
    assert len(servers_in(tmp_path / "run")) == 2
    assert len(list((tmp_path / "run" / "eval").glob("*.json"))) == 2
    assert not servers_of(model[0])
    assert not transfer_of(tmp_path / "run").exists()
    assert not (tmp_path / "run" / "vllm").exists()


@pytest.mark.parametrize(
    ("layout", "processes", "more"),
    [("ep2", 2, ""), pytest.param("tp2-ep2", 2, ", expert_tensor_parallel_size: 1", marks=pytest.mark.long)],
)
def test_a_run_of_a_mixture(layout, processes, more, tmp_path):
    """The trainer's ranks share the experts, and a server has all of them."""
    model = tiny.make_model(tmp_path / "model", tied=False, **EXPERTS), tiny.make_problems(tmp_path / "problems.jsonl")
    settings = write_settings(tmp_path, model, layout=EXPERT_LAYOUTS[layout] + more)
    ended = forked_ranks.train(tmp_path, settings, processes=processes)
    assert ended.statuses == [0] * processes, ended
    check(tmp_path / "run")


def failures() -> list:
    """(path, count, what the server does). `make test` has each kind of failure once."""
    places = {
        "/inference/v1/generate": (MODE + 9, "exit"),
        "/start_weight_update": (2, None),
        "/update_weights": (4, "hang"),
        "/finish_weight_update": (2, None),
        "/reset_prefix_cache": (2, "status"),
    }
    return [
        pytest.param(path, count, do, marks=() if do == short else pytest.mark.long, id=f"{do}{path}")
        for path, (count, short) in places.items()
        for do in ("exit", "hang", "status")
    ]


@pytest.mark.parametrize(("path", "count", "do"), failures())
def test_a_server_fails(path, count, do, model, tmp_path):
    """The run ends as if nothing had happened. The server was started again with the weights of that moment."""
    settings = write_settings(tmp_path, model, fault={"path": path, "count": count, "do": do})
    ended = forked_ranks.train(tmp_path, settings)
    assert ended.statuses == [0, 0], ended
    assert (tmp_path / "marker").exists()
    check(tmp_path / "run")
    notes = [json.loads(line) for line in ended.out[0].splitlines()]
    (note,) = [note["message"] for note in notes if "is started again" in note.get("message", "")]
    assert note.startswith("vLLM server ")


LORA = "model.lora={rank: 4, alpha: 8.0}"


@pytest.mark.parametrize("transfer", [pytest.param("merged", marks=pytest.mark.long), "adapter"])
@pytest.mark.parametrize("layout", [pytest.param("tp2", marks=pytest.mark.long), "tp2-pp2"])
def test_adapters(layout, transfer, model, tmp_path):
    """Both ways give the same tokens. One server fails on the way."""
    processes, megatron = LAYOUTS[layout]
    fault = {"path": "/inference/v1/generate", "count": MODE + 12, "do": "exit"}
    settings = write_settings(tmp_path, model, layout=megatron, fault=fault)
    ended = forked_ranks.train(tmp_path, settings, LORA, f"rollout.lora_transfer={transfer}", processes=processes)
    assert ended.statuses == [0] * processes, ended
    assert (tmp_path / "marker").exists()
    check(tmp_path / "run")
    assert not transfer_of(tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("path", "count", "do"),
    [
        pytest.param("/inference/v1/generate", MODE + 9, "abort", marks=pytest.mark.long),
        ("/update_weights", 4, "truncate"),
    ],
)
def test_wrong_answers(path, count, do, model, tmp_path):
    settings = write_settings(tmp_path, model, fault={"path": path, "count": count, "do": do})
    ended = forked_ranks.train(tmp_path, settings)
    assert ended.statuses == [0, 0], ended
    assert (tmp_path / "marker").exists()
    check(tmp_path / "run")


@pytest.mark.parametrize(
    ("path", "count", "do"),
    [pytest.param("/update_weights", 12, "stale", marks=pytest.mark.long), ("/reset_prefix_cache", 2, "kept")],
)
def test_stale_weights(path, count, do, model, tmp_path):
    """The server says that it has the new weights. Its log-probabilities say that it has the old ones."""
    settings = write_settings(tmp_path, model, fault={"path": path, "count": count, "do": do})
    message = forked_ranks.train(tmp_path, settings, "run.sampler_gap_limit=1e-4").message
    assert "differ by" in message
    assert message.endswith("the server does not sample with the weights of the trainer")


def test_a_full_folder(model, tmp_path):
    settings = write_settings(tmp_path, model)
    folder = tmp_path / "shared"
    message = forked_ranks.train(
        tmp_path, settings, f"rollout.vllm.transfer_folder={folder}", file_size={0: 15_000}
    ).message
    assert "Cannot write" in message
    assert str(folder) in message
    assert "write to another disk" in message


def test_a_shared_folder(model, tmp_path):
    """Files have new names in every update, and none is left."""
    settings = write_settings(tmp_path, model)
    ended = forked_ranks.train(tmp_path, settings, f"rollout.vllm.transfer_folder={tmp_path / 'shared'}")
    assert ended.statuses == [0, 0], ended
    check(tmp_path / "run")
    assert not list((tmp_path / "shared").iterdir())


def with_urls(settings: Path, *urls: str, **more: float) -> Path:
    """The settings with servers that already run."""
    text = settings.read_text()
    ours = text[text.index("vllm: {") : text.index("max_new_tokens: ")]
    theirs = f"vllm: {json.dumps({'urls': urls, **more})}, "
    settings.write_text(text.replace(ours, theirs))
    return settings


@contextmanager
def running_server(model: Path, *options: str) -> Iterator[str]:
    """The address of a stand-in that a user has started."""
    port = free_port()
    command = [sys.executable, "-m", "tests.support.vllm_stand_in", "--model", str(model), "--port", str(port)]
    with subprocess.Popen([*command, *options], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        yield f"http://127.0.0.1:{port}"
        process.kill()


@pytest.mark.parametrize(
    ("mode", "temperature", "needed"),
    [
        pytest.param("raw_logprobs", 1.0, "raw_logprobs", marks=pytest.mark.long),
        ("raw_logprobs", 0.9, "processed_logprobs"),
        ("processed_logprobs", 1.0, "raw_logprobs"),
        ("processed_logprobs", 0.9, "processed_logprobs"),
    ],
)
def test_servers_that_already_run(mode, temperature, needed, model, tmp_path):
    """They need the mode of log-probabilities that fits the temperature. The message names it."""
    settings = write_settings(tmp_path, model)
    with running_server(model[0], "--logprobs-mode", mode) as url:
        with_urls(settings, url)
        ended = forked_ranks.train(tmp_path, settings, f"rollout.temperature={temperature}")
    if mode == needed:
        assert ended.statuses == [0, 0], ended
        check(tmp_path / "run")
        return
    assert ended.message == (
        f"megatron-paint: error: vLLM server 0 ({url}) runs with --logprobs-mode {mode}, and the run needs {needed}: "
        f"start it with --logprobs-mode {needed}"
    )


def test_a_port_that_answers_nothing(model, tmp_path):
    settings = write_settings(tmp_path, model)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with_urls(settings, url, start_timeout_s=1.0, hang_timeout_s=0.5)
        message = forked_ranks.train(tmp_path, settings).message
    assert f"vLLM server 0 ({url}) does not start: " in message
    assert "start_timeout_s=1" in message


def test_a_server_that_does_not_start(model, tmp_path):
    settings = write_settings(tmp_path, model)
    message = forked_ranks.train(
        tmp_path, settings, "rollout.vllm.command=[python3,-c,raise SystemError('no GPU')]"
    ).message
    named = re.search(
        r"vLLM server ([01]) .* does not start: starting: SystemError: no GPU.*/vllm_server_\1\.log$", message
    )
    assert named, message  # either of the two may end first


def test_an_option_that_changes_the_log_probabilities(model, tmp_path):
    settings = write_settings(tmp_path, model)
    more = "rollout.vllm.extra_args=[--logprobs-mode,processed_logprobs]"
    message = forked_ranks.train(tmp_path, settings, more).message
    assert "runs with --logprobs-mode processed_logprobs, and the run needs raw_logprobs: leave" in message


def test_restarts_have_an_end(model, tmp_path):
    settings = write_settings(tmp_path, model, fault={"path": "/update_weights", "count": 4, "do": "exit"})
    message = forked_ranks.train(tmp_path, settings, "rollout.vllm.restarts=0").message
    assert "updating weights: " in message
    assert "rollout.vllm.restarts=0 allows no more restarts" in message


@pytest.mark.parametrize("what", ["start", "run"])
def test_a_killed_run_leaves_nothing(what, model, tmp_path):
    """SIGKILL of all ranks, while servers start or while they sample."""
    settings = write_settings(tmp_path, model)
    running = forked_ranks.start(tmp_path, "train", settings, "run.steps=1000", "--json")
    run = tmp_path / "run"
    until(
        lambda: servers_of(model[0]) if what == "start" else (run / "samples" / "step_000001.jsonl").exists(),
        seconds=200,
        every=0.05,
    )
    for pid in running.pids:
        os.kill(pid, signal.SIGKILL)
    running.wait()
    until(lambda: not servers_of(model[0]) and not transfer_of(run).exists(), seconds=200, every=0.05)


@pytest.mark.long  # test_a_killed_run_goes_on_ahead kills one too
def test_a_killed_run_goes_on(model, tmp_path):
    settings = write_settings(tmp_path, model)
    running = forked_ranks.start(tmp_path, "train", settings, "--json")
    run = tmp_path / "run"
    until(lambda: (run / "checkpoints" / "step_000002" / "complete").exists(), seconds=200, every=0.05)
    for pid in running.pids:
        os.kill(pid, signal.SIGKILL)
    running.wait()
    ended = forked_ranks.train(tmp_path, settings, "run.resume=auto")
    assert ended.statuses == [0, 0], ended
    check(run)


AHEAD = "rollout.ahead=1"
NO_EVALUATION = "evaluation.problems=null"
# Counted after the spot check, the self-check and the rollouts of step 1.
WHILE_STEP_1_TRAINS = {"path": "/inference/v1/generate"}
CUT = ("rollout.temperature=0.9", "rollout.top_k=40")  # vLLM has no log-probabilities of these


def same_run(run: Path, other: Path, *, steps: int = STEPS) -> None:
    """The same samples and metrics. Servers and the names of their weights differ, and so do times."""

    def lines(of: Path) -> list[dict]:
        samples = samples_of(of, steps=steps)
        for sample in samples:
            del sample["origin"]["server"]
            for span in sample["origin"]["weights"]:
                span["version"] = span["version"].partition("/")[2]
        return samples

    assert lines(run) == lines(other)
    ours = [{k: v for k, v in line.items() if not k.startswith("rollout/")} for line in metrics(run)]
    assert ours == [{k: v for k, v in line.items() if not k.startswith("rollout/")} for line in metrics(other)]


@pytest.mark.parametrize(
    ("layout", "cut"),
    [
        pytest.param("dp2", (), id="dp2", marks=pytest.mark.long),
        pytest.param("tp2-pp2", CUT, id="tp2-pp2-cut"),
        pytest.param("dp2", CUT, id="dp2-cut", marks=pytest.mark.long),
        pytest.param("tp2-pp2", (), id="tp2-pp2", marks=pytest.mark.long),
    ],
)
def test_one_step_ahead(layout, cut, model, tmp_path):
    """Step N learns from rollouts of the weights before step N - 1, at every layout from the same ones.

    Importance weights come from the servers' log-probabilities, or from the trainer's own.
    """
    processes, megatron = LAYOUTS[layout]
    settings = write_settings(tmp_path, model, layout=megatron)
    ended = forked_ranks.train(tmp_path, settings, AHEAD, *cut, processes=processes)
    assert ended.statuses == [0] * processes, ended
    run = tmp_path / "run"
    if cut:
        assert [sample["origin"]["behind"] for sample in samples_of(run)] == [0] * SAMPLES + [1] * 2 * SAMPLES
        assert metrics(run)[0]["sampler_gap/max"] is None
    else:
        check(run, ahead=1)
    assert [line["rollout/steps_behind"] for line in metrics(run)] == [0, 1, 1]
    assert "importance/mean" not in metrics(run)[0]
    weights = [line["importance/mean"] for line in metrics(run)[1:]]
    assert all(0.5 < weight < 1.5 for weight in weights)
    assert 1.0 not in weights
    assert len(list((run / "eval").glob("*.json"))) == 2
    assert not servers_of(model[0])


@pytest.mark.parametrize("do", ["exit", pytest.param("hang", marks=pytest.mark.long)])
def test_a_server_fails_ahead(do, model, tmp_path):
    """While step 1 trains. The other server samples its prompts, with the same weights."""
    settings = write_settings(tmp_path, model, fault=WHILE_STEP_1_TRAINS | {"count": MODE + 8, "do": do})
    ended = forked_ranks.train(tmp_path, settings, AHEAD, NO_EVALUATION)
    assert ended.statuses == [0, 0], ended
    assert (tmp_path / "marker").exists()
    check(tmp_path / "run", ahead=1)
    printed = [json.loads(line) for line in ended.out[0].splitlines()]
    steps = [event["step"] for event in printed if event["event"] == "step"]
    restart = next(i for i, event in enumerate(printed) if "is started again" in event.get("message", ""))
    assert steps == [1, 2, 3]
    assert [event["step"] for event in printed[:restart] if event["event"] == "step"] == [1]


@pytest.mark.long
def test_all_servers_fail_ahead(model, tmp_path):
    """What they had not sampled of step 2 is sampled in it, with the weights of that step."""
    settings = write_settings(tmp_path, model, fault=WHILE_STEP_1_TRAINS | {"count": MODE + 12, "do": "exit"})
    ended = forked_ranks.train(tmp_path, settings, AHEAD, NO_EVALUATION, "rollout.vllm.servers=1")
    assert ended.statuses == [0, 0], ended
    assert (tmp_path / "marker").exists()
    samples = samples_of(tmp_path / "run")
    behind = {step: [s["origin"]["behind"] for s in samples if s["step"] == step] for step in (1, 2, 3)}
    assert behind[1] == [0] * SAMPLES
    assert 0 in behind[2]  # those that were in flight when the server ended, or came later
    assert behind[3] == [1] * SAMPLES
    versions = [int(sample["origin"]["weights"][0]["version"].partition("/")[2]) for sample in samples]
    assert versions == [sample["step"] - 1 - sample["origin"]["behind"] for sample in samples]


@pytest.mark.parametrize("updates", [pytest.param(1, marks=pytest.mark.long), 2])
def test_grpo_ahead(updates, model, tmp_path):
    """Its ratio is to the weights that sampled a response, so it is not 1 in the first update of a later step."""
    settings = write_settings(tmp_path, model)
    grpo = {"clip_low": 1e-5, "clip_high": 1e-5, "updates_per_batch": updates}
    group = ("objective.name=grpo", "rollout.samples_per_problem=4", "domains.math.grader=tests.support.rewards:even")
    ended = forked_ranks.train(
        tmp_path, settings, AHEAD, NO_EVALUATION, *group, *(f"objective.grpo.{name}={grpo[name]}" for name in grpo)
    )
    assert ended.statuses == [0, 0], ended
    lines = metrics(tmp_path / "run")
    assert all(line["loss_tokens"] > 0 for line in lines)
    shares = [line["ratio/clipped_share"] for line in lines]
    if updates == 1:
        assert shares[0] == 0.0
    assert all(share > 0.1 for share in shares[1:])


@pytest.mark.long
def test_adapters_ahead(model, tmp_path):
    settings = write_settings(tmp_path, model)
    ended = forked_ranks.train(tmp_path, settings, AHEAD, LORA, "rollout.lora_transfer=adapter")
    assert ended.statuses == [0, 0], ended
    check(tmp_path / "run", ahead=1)


def test_a_stop_does_not_wait_for_servers(model, tmp_path):
    """The run is told to stop in step 2. What a server does not complete is sampled in step 3, by its own weights."""
    settings = write_settings(tmp_path, model, fault=WHILE_STEP_1_TRAINS | {"count": MODE + 11, "do": "hang"})
    given = ("train", settings, AHEAD, NO_EVALUATION, "rollout.vllm.hang_timeout_s=600", "--json")
    ended = forked_ranks.run(tmp_path, *given, target="tests.reliability.spoilt:signalled", limit=120.0)
    assert ended.statuses == [75, 75], ended  # it stopped before its end
    assert (tmp_path / "marker").exists()
    run = tmp_path / "run"
    assert (run / "checkpoints" / "step_000002" / "complete").exists()
    ended = forked_ranks.train(tmp_path, settings, AHEAD, NO_EVALUATION, "run.resume=auto")
    assert ended.statuses == [0, 0], ended
    behind = {step: {s["origin"]["behind"] for s in samples_of(run) if s["step"] == step} for step in (1, 2, 3)}
    assert (behind[1], behind[2]) == ({0}, {1})
    assert 0 in behind[3]


@pytest.mark.parametrize("cut", [pytest.param((), marks=pytest.mark.long, id=""), pytest.param(CUT, id="cut")])
def test_a_killed_run_goes_on_ahead(cut, model, tmp_path):
    """It learns from the rollouts that its checkpoint holds, and ends as an undisturbed one."""
    settings = write_settings(tmp_path, model)
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    ended = forked_ranks.train(tmp_path, settings, AHEAD, *cut, f"run.dir={undisturbed}")
    assert ended.statuses == [0, 0], ended
    running = forked_ranks.start(tmp_path, "train", settings, AHEAD, *cut, "--json")
    until(lambda: (run / "checkpoints" / "step_000002" / "complete").exists(), seconds=200, every=0.05)
    for pid in running.pids:
        os.kill(pid, signal.SIGKILL)
    running.wait()
    ended = forked_ranks.train(tmp_path, settings, AHEAD, *cut, "run.resume=auto")
    assert ended.statuses == [0, 0], ended
    same_run(run, undisturbed)


PLACES = {
    "start": 8,
    "rollout": 8,
    "teacher": 3,
    "student": 3,
    "optimizer": 2,
    "copy": 2,
    "write": 2,
    "flush": 20,
    "record": 2,
}
KILLS = 10


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_killed_at_any_moment_ahead(model, tmp_path):
    """Each start goes on where its checkpoint is; at the end nothing was trained on twice, or with other weights."""
    settings, steps = write_settings(tmp_path, model), STEPS + KILLS
    arguments = (AHEAD, "evaluation.problems=null", f"run.steps={steps}", "run.save_every=1", "--json")
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    ended = forked_ranks.run(tmp_path, "train", settings, f"run.dir={undisturbed}", *arguments)
    assert ended.statuses == [0, 0], ended
    random, places = Random(5), Counter()
    while sum(places.values()) < KILLS:
        where, most = random.choice(list(PLACES.items()))
        rank, number = random.randrange(2) if where in ("start", "teacher", "student") else 0, random.randint(1, most)
        command = ("train", settings, "run.resume=auto", *arguments, f"{rank}:{where}:{number}")
        ended = forked_ranks.run(tmp_path, *command, target="tests.reliability.spoilt:killed")
        if ended.statuses == [0, 0]:
            break  # it came to its end before it came there
        assert ended.statuses[rank] == -signal.SIGKILL, ended
        places[where] += 1
    ended = forked_ranks.run(tmp_path, "train", settings, "run.resume=auto", *arguments)
    assert ended.statuses == [0, 0], ended
    same_run(run, undisturbed, steps=steps)
    print(f"killed {sum(places.values())} times: {dict(places)}")
    assert sum(places.values()) >= KILLS / 2


def test_evaluations(model, tmp_path):
    """Greedy answers of the servers are those of the trainer's own sampler; a second call samples nothing again."""
    settings = write_settings(tmp_path, model)
    answers = {}
    for engine in ("megatron", "vllm"):
        arguments = ("evaluate", settings, "--engine", engine, "--out", tmp_path / engine, "--processes", "1")
        ended = forked_ranks.run(tmp_path, *arguments, processes=1)
        assert ended.statuses == [0], ended
        lines = [json.loads(line) for line in (tmp_path / engine / "problems.answers.jsonl").read_text().splitlines()]
        answers[engine] = {line["id"]: line["response_ids"] for line in lines if line.get("sample") == -1}
    assert answers["vllm"] == answers["megatron"]
    assert len(answers["vllm"]) == 3
    assert not servers_of(model[0])


def test_a_prompt_that_a_server_does_not_take_is_found_at_the_start(model, tmp_path):
    """The longest prompt has 122 tokens, that of the evaluation 111."""
    settings = write_settings(tmp_path, model)
    message = forked_ranks.train(tmp_path, settings, "rollout.vllm.max_model_len=129").message
    assert "no room for 1 of 8 prompts and their responses: the longest prompt, of " in message
    assert (
        "problems.jsonl:8, has 122 tokens, rollout.max_new_tokens is 8, and a server takes 129; raise that" in message
    )
    assert "to 130 (rollout.vllm.max_model_len, --max-model-len), lower rollout.max_new_tokens to 7 or less" in message
    assert not list((tmp_path / "run" / "samples").iterdir())
    short = ("rollout.vllm.max_model_len=130", "evaluation.max_new_tokens=20")
    for command, processes, more in (
        ("train", 2, [f"run.dir={tmp_path / 'other'}"]),
        ("evaluate", 1, ["--engine", "vllm", "--out", tmp_path / "out", "--processes", "1"]),
    ):
        message = forked_ranks.run(tmp_path, command, settings, *more, *short, processes=processes).message
        assert "has 111 tokens, evaluation.max_new_tokens is 20, and a server takes 130" in message
    assert not servers_of(model[0])
