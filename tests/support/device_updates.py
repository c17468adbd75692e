"""Updates of stand-in servers by `DeviceTransfer` in one process, over weights of Hugging Face folders."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megatron_paint.config.vllm import VllmSettings
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters
from megatron_paint.rollouts.vllm.command import ServerOptions
from megatron_paint.rollouts.vllm.device_transfer import DeviceTransfer
from megatron_paint.rollouts.vllm.fleet import Fleet
from megatron_paint.rollouts.vllm.sampler import VllmSampler
from megatron_paint.rollouts.vllm.spot_check import SpotCheck
from megatron_paint.runtime.rank_zero import directly
from tests.support.folder_weights import FolderWeights
from tests.support.numpy_qwen3 import NumpyQwen3, log_softmax

ROOT = Path(__file__).parents[2]
VOCABULARY = 264  # of the tiny models
MESSAGE_BYTES = 6000
PROMPTS = ((1, 2, 3), tuple(range(40, 80)), tuple(range(100, 120)))  # one or more blocks of the cache, and none
TOKENS = 3


class Run:
    """A sampler with one rank, and its servers. vLLM's trainer side must be importable, whichever it is."""

    def __init__(
        self,
        transfer: Literal["nccl", "ipc"],
        folders: Sequence[Path],
        folder: Path,
        *,
        python: str = sys.executable,
        fault: dict | None = None,
        servers: int = 2,
        workers: int = 1,
        hang_timeout: float = 30.0,
    ) -> None:
        """folders: of the models of the updates; the servers start with the first. folder: for what the run writes.

        python: of the stand-ins.
        """
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if fault:
            environment["STAND_IN_FAULT"] = json.dumps(fault | {"marker": str(folder / "marker")})
        settings = VllmSettings(
            command=(python, "-m", "tests.support.vllm_stand_in"),
            environment=environment,
            servers=servers,
            devices=("0",) * servers if transfer == "ipc" else (),
            tensor_parallel=workers,
            transfer=transfer,
            hang_timeout_s=hang_timeout,
        )
        self.notes: list[str] = []
        engine = ServerOptions(
            settings=settings, dtype="float32", logprobs_mode="raw_logprobs", on_gpus=False, transfer=transfer
        )
        self.fleet = Fleet(engine, vocab_size=VOCABULARY, logs=folder / "logs", note=self.notes.append)
        self.folders, self.current = folders, folders[0]
        self.fleet.start(folders[0])
        self.weights = FolderWeights(folders[0], tied=False)
        self.transfer = DeviceTransfer(
            self.weights,
            transfer=transfer,
            rank=0,
            message_bytes=MESSAGE_BYTES,
            on_rank_zero=directly,
            everyone=lambda act: [act()],
        )
        self.fleet.wait_until_ready(self.transfer.init_info)
        self.sampler = VllmSampler(
            self.fleet,
            weights=self.weights,
            transfer=self.transfer,
            spot_check=SpotCheck(self.score, limit=1e-6),
            start_model=folders[0],
            exports=folder / "exports",
            on_rank_zero=directly,
        )

    def score(self, sequences) -> list[tuple[float, ...]]:
        """Log-probabilities of the newest weights, in numpy."""
        model = NumpyQwen3(self.current)
        found = []
        for one in sequences:
            ids = (*one.prompt_ids, *one.response_ids)
            places = range(len(one.prompt_ids), len(ids))
            found.append(tuple(float(log_softmax(model.logits(ids[:place]))[ids[place]]) for place in places))
        return found

    def update(self, number: int) -> None:
        """New weights, and samples with them, which must be greedy tokens of these weights on every server."""
        self.current = self.folders[number]
        self.weights.take(self.current)
        self.sampler.sync_weights(number + 1)
        requests = [
            GenerationRequest(problem_id=f"p{i}", sample_index=0, prompt_ids=prompt, key=i)
            for i, prompt in enumerate(PROMPTS)
        ]
        greedy = SamplingParameters(max_new_tokens=TOKENS, temperature=0.0, top_p=1.0, top_k=0, stop_ids=frozenset())
        rollouts = self.sampler.generate(requests, greedy)
        model = NumpyQwen3(self.current)
        for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
            ids = list(prompt)
            for _ in range(TOKENS):
                ids.append(int(model.logits(ids).argmax()))
            assert rollout.response_ids == tuple(ids[len(prompt) :])
            assert [span.version.partition("/")[2] for span in rollout.origin.weights] == [str(number)]
        assert self.sampler.metrics()["rollout/spot_check_gap"] < 1e-9

    def close(self) -> None:
        self.sampler.close()
        self.transfer.close()
        self.fleet.close()
