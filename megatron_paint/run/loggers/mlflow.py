"""MLflow: metrics, settings, evaluations and samples of a run."""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from megatron_paint.base.errors import UserError
from megatron_paint.base.json_text import to_json
from megatron_paint.config.saved import dotted
from megatron_paint.config.secrets import without_credentials
from megatron_paint.run.loggers.interface import PROJECT, Outcome, RunInfo, SampleTable
from megatron_paint.run.loggers.remote_ids import LOGGERS, read_ids, write_ids

MISSING = "it is not installed: pip install 'megatron-paint[mlflow]'"
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
METRICS_A_REQUEST, PARAMETERS_A_REQUEST = 1000, 100  # MLflow's limits
LONGEST_PARAMETER = 500  # characters, which every server accepts
NOT_IN_A_NAME = re.compile(r"[^\w\-. :/]")
TABLES_TAG = "mlflow.loggedArtifacts"  # MLflow's page of tables reads it

T = TypeVar("T")


class MlflowLogger:
    """Logs with the library `mlflow` or `mlflow-skinny`, to MLFLOW_TRACKING_URI or else into RUN/mlflow.

    It uses MLflow's client and no current run, so it changes nothing for other code of the process.
    """

    name = "mlflow"
    fix = "check MLFLOW_TRACKING_URI and its server, or unset it: MLflow then writes into RUN/mlflow"
    in_background = True

    def __init__(self, info: RunInfo) -> None:
        self.info = info
        self._client: Any = None
        self._run_id = ""

    def open(self) -> str:
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise UserError(MISSING) from error
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (self.info.folder / "mlflow").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow from 3.13 on asks for it
        self._client = MlflowClient(tracking_uri=uri)
        place = without_credentials(uri)
        stored = read_ids(self.info.folder, self.name)
        earlier, notice = stored.get("run_id", "") if stored.get("place") == place else "", ""
        if earlier and self._exists(earlier):
            self._run_id = earlier
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            if stored.get("place") == place:  # the user may miss what was logged before
                gone = f"its earlier run {earlier} was deleted there" if earlier else f"{LOGGERS} has no run_id"
                notice = f"; {gone}, so this is a new one, from step {self.info.resume_step + 1} on"
            self._run_id = self._create_run()
            write_ids(self.info.folder, self.name, {"run_id": self._run_id, "place": place})
        self._log_settings()
        return f"logging to {place}, run {self._run_id}{notice}"

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        found = [Metric(metric_name(name), float(value), now, step) for name, value in values.items()]
        for part in _parts(found, METRICS_A_REQUEST):
            self._client.log_batch(self._run_id, metrics=part)

    def samples(self, step: int, table: SampleTable) -> None:
        file = f"samples/step_{step:06d}.json"
        text = to_json({"columns": list(table.columns), "data": [list(row) for row in table.rows]})
        self._client.log_text(self._run_id, text, file)
        tables = json.loads(self._client.get_run(self._run_id).data.tags.get(TABLES_TAG, "[]"))
        entry = {"path": file, "type": "table"}
        if entry not in tables:
            self._client.set_tag(self._run_id, TABLES_TAG, to_json([*tables, entry]))

    def close(self, outcome: Outcome) -> None:
        self._client.set_terminated(self._run_id, status=STATUS[outcome])

    def is_temporary(self, error: Exception) -> bool:
        """A server that does not answer. What it refuses is a `RestException`."""
        from mlflow.exceptions import MlflowException, RestException

        return (
            isinstance(error, MlflowException) and not isinstance(error, RestException) and "API request" in str(error)
        )

    def _exists(self, run_id: str) -> bool:
        """Whether the run is there and not deleted, which MLflow can undo."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _create_run(self) -> str:
        project = self.info.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(project)
        if experiment is not None and experiment.lifecycle_stage != "active":
            raise UserError(f"the experiment {project!r} was deleted there: restore it, or set another run.project")
        experiment_id = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        name = self.info.name or os.environ.get("MLFLOW_RUN_NAME") or self.info.folder.name
        return self._client.create_run(experiment_id, run_name=name).info.run_id

    def _log_settings(self) -> None:
        """Settings as parameters. MLflow never changes one: what a resumed run changed becomes a tag `changed.KEY`."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self._run_id).data.params
        values = {NOT_IN_A_NAME.sub("_", key): _parameter(value) for key, value in dotted(self.info.settings).items()}
        new = [Param(key, value) for key, value in values.items() if key not in known]
        changed = [RunTag(f"changed.{key}", value) for key, value in values.items() if known.get(key, value) != value]
        for part in _parts(new, PARAMETERS_A_REQUEST):
            self._client.log_batch(self._run_id, params=part)
        for part in _parts(changed, PARAMETERS_A_REQUEST):
            self._client.log_batch(self._run_id, tags=part)


def metric_name(name: str) -> str:
    """The name that MLflow accepts: pass@4 becomes pass_at_4, and other special characters become _.

    Only the first slash stays, and the others become dots: a local folder has a file for each metric, so eval/x/avg and
    eval/x/avg/low cannot exist together.
    """
    group, slash, rest = NOT_IN_A_NAME.sub("_", name.replace("@", "_at_")).partition("/")
    return group + slash + rest.replace("/", ".")


def _parameter(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= LONGEST_PARAMETER else f"{text[: LONGEST_PARAMETER - 4]} ..."


def _parts(values: Sequence[T], size: int) -> Iterator[list[T]]:
    """The values in lists of at most `size`."""
    remaining = iter(values)
    while part := list(islice(remaining, size)):
        yield part
