"""The real library with a local folder, and a server that does not answer."""

import json
import shutil

import pytest

from megatron_paint.run.loggers.loggers import Loggers
from megatron_paint.run.loggers.mlflow import MlflowLogger, metric_name
from tests.run.loggers.stand_ins import SETTINGS, evaluation, info, report

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def local(monkeypatch):
    for name in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME"):
        monkeypatch.delenv(name, raising=False)


def train(folder, steps, *, start=0, settings=SETTINGS, outcome="finished"):
    lines = []
    made = MlflowLogger(info(folder, resume_step=start, settings=settings))
    opened = Loggers([made], samples_every=2, note=lines.append, warn=lines.append)
    opened.open()
    for step in steps:
        opened.step(*report(step, **{"pass@4": 0.25}))
    opened.evaluation(evaluation(steps[-1]))
    opened.close(outcome)
    return lines


def test_a_local_folder_and_a_run_that_resumes_as_the_same_run(tmp_path):
    line, *more = train(tmp_path, (1, 2), outcome="stopped")
    assert more == []
    stored = json.loads((tmp_path / "loggers.json").read_text())["mlflow"]
    assert line == f"mlflow: logging to {(tmp_path / 'mlflow').as_uri()}, run {stored['run_id']}"
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    assert client.get_run(stored["run_id"]).info.status == "KILLED"
    changed = {**SETTINGS, "optimizer": {**SETTINGS["optimizer"], "lr": 1.0e-5}}
    train(tmp_path, (2, 3), start=1, settings=changed)
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (stored["run_id"], "first", "FINISHED")
    assert run.data.params["optimizer.lr"] == "5e-06"
    assert run.data.tags["changed.optimizer.lr"] == "1e-05"
    assert run.data.params["model.lora"] == "null"
    steps = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(steps) == [(1, 0.5), (2, 0.5), (2, 0.5), (3, 0.5)]
    assert run.data.metrics["pass_at_4"] == 0.25
    assert run.data.metrics["eval/tiny.avg"] == 1.0
    folder = client.download_artifacts(run.info.run_id, "samples", str(tmp_path))
    table = json.loads((tmp_path / "samples" / "step_000002.json").read_text())
    assert folder.rstrip("/").endswith("samples")
    assert table["columns"][:2] == ["id", "sample"]
    assert table["data"][0][-1] == "a | <b>bold</b>\n# two"
    tables = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert [entry["path"] for entry in tables] == ["samples/step_000001.json", "samples/step_000002.json"]


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("deleted", "its earlier run {} was deleted there"),
        ("purged", "its earlier run {} was deleted there"),
        ("run_id", "loggers.json has no run_id"),
    ],
)
def test_a_run_that_is_no_longer_there_becomes_a_new_one(tmp_path, lost, says):
    train(tmp_path, (1, 2), outcome="stopped")
    stored = json.loads((tmp_path / "loggers.json").read_text())
    earlier = stored["mlflow"]["run_id"]
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    if lost == "deleted":
        client.delete_run(earlier)
    elif lost == "purged":
        (folder,) = (tmp_path / "mlflow").glob(f"*/{earlier}")
        shutil.rmtree(folder)
    else:
        del stored["mlflow"]["run_id"]
        (tmp_path / "loggers.json").write_text(json.dumps(stored))
    (line,) = train(tmp_path, (2, 3), start=1)
    run_id = json.loads((tmp_path / "loggers.json").read_text())["mlflow"]["run_id"]
    assert run_id != earlier
    expected = f", run {run_id}; {says.format(earlier)}, so this is a new one, from step 2 on"
    assert line.endswith(expected)
    assert [metric.step for metric in client.get_metric_history(run_id, "loss")] == [2, 3]


def test_a_deleted_experiment_is_named(tmp_path):
    train(tmp_path, (1,))
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    client.delete_experiment(client.get_experiment_by_name("tests").experiment_id)
    (line,) = train(tmp_path, (2,), start=1)
    assert line == (
        "mlflow: the experiment 'tests' was deleted there: restore it, or set another run.project. The run continues "
        "without it"
    )


def test_every_key_of_a_run_is_a_name_that_mlflow_accepts():
    assert metric_name("eval/tiny/pass@16") == "eval/tiny.pass_at_16"
    assert metric_name("eval/my (set)/avg") == "eval/my _set_.avg"
    assert metric_name("time/rollout_s") == "time/rollout_s"


def test_a_server_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("megatron_paint.run.loggers.loggers.OPEN_SECONDS", 1.0)
    lines = train(tmp_path, (1,))
    assert lines[-1].startswith("mlflow: ")
    assert lines[-1].endswith(
        "; check MLFLOW_TRACKING_URI and its server, or unset it: MLflow then writes into RUN/mlflow"
    )
    assert not [line for line in lines if "secret" in line]
