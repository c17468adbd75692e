"""A server with the endpoints of vLLM 0.32 that a run uses, over a model in numpy, and with faults on demand.

It keeps vLLM's traps: an update leaves the prefix cache, a failed update leaves the server useless, status 200 for a
response that was aborted, exit status 0 after a fault. STAND_IN_FAULT is JSON: {"path", "count", "do", "marker"}.
At the count-th request to this path it does so, unless the file `marker` exists, which it makes. What it can do: exit,
hang, status (500), abort, stale (forget an update), kept (leave the prefix cache), truncate (a file before it is
read), leave (the group, in the middle of an update).

Weights come through files, or from the trainer's side of `fake_vllm.py`. The server has --tensor-parallel-size workers:
each is a member of the group, and each reads the buffer of the rank on its GPU.
"""

import argparse
import base64
import copy
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import numpy as np
from safetensors.numpy import load_file

from tests.support.numpy_qwen3 import NumpyQwen3, Past, log_softmax
from tests.support.tcp_group import TcpGroup

BLOCK = 16  # tokens; complete blocks of a prompt are cached


class Engine:
    """The model, its weight version, and a prefix cache: keys, values and last logits of prompts that it has seen."""

    def __init__(self, model: str, *, raw: bool, longest: int | None, workers: int = 1) -> None:
        self.model = NumpyQwen3(model)
        self.raw, self.longest = raw, longest or self.model.config["max_position_embeddings"]
        self.version, self.paused, self.updating = "default", False, False
        self.cache: dict[tuple, tuple[np.ndarray, Past]] = {}
        self.adapters: dict[str, NumpyQwen3] = {}
        self.lock = threading.Lock()
        self.loaded: set[str] = set()
        self.computed = 0.0
        self.workers = workers
        self.groups: list[TcpGroup] = []  # of each worker
        self.packed_bytes = 0
        self.leaves = False  # in the middle of the next update
        self.asleep: set[str] = set()  # what has no memory

    def load_adapter(self, name: str, path: str) -> None:
        """A copy of the model with the adapter merged. The files must exist as long as it is loaded."""
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / config["r"]
        tensors = load_file(Path(path) / "adapter_model.safetensors")
        merged = copy.copy(self.model)
        merged.weights = dict(self.model.weights)
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            weight = key.removeprefix("base_model.model.").replace(".lora_A", "")
            a, b = (tensors[key.replace("lora_A", side)].astype(np.float64) for side in ("lora_A", "lora_B"))
            merged.weights[weight] = merged.weights[weight] + scale * b @ a
        self.adapters[name] = merged

    def sample(self, prompt: list[int], asked: dict, name: str | None) -> dict:
        random = np.random.default_rng(asked["seed"])
        model = self.model if name is None else self.adapters[name]
        logits, past = self.read(model, tuple(prompt), name)
        tokens, logprobs, reason = [], [], "length"
        while len(tokens) < min(asked["max_tokens"], self.longest - len(prompt)):
            if tokens:
                logits = model.logits(tokens[-1:], past)
            kept = log_softmax(logits / (asked["temperature"] or 1.0))
            if asked["top_k"]:
                kept[kept < np.sort(kept)[-asked["top_k"]]] = -np.inf
            order = np.argsort(-kept)
            before = np.cumsum(np.exp(kept[order])) - np.exp(kept[order])
            kept[order[before >= asked["top_p"]]] = -np.inf
            kept = log_softmax(kept)
            greedy = asked["temperature"] == 0
            token = int(logits.argmax() if greedy else random.choice(len(kept), p=np.exp(kept)))
            tokens.append(token)
            self.computed += 1
            logprobs.append(float((log_softmax(logits) if self.raw else kept)[token]))
            if token in asked["stop_token_ids"]:
                reason = "stop"
                break
        spans = [{"version": self.version, "start": 0, "end": len(tokens)}]
        content = [{"token_id": t, "logprob": v, "rank": 1} for t, v in zip(tokens, logprobs, strict=True)]
        return {
            "index": 0,
            "token_ids": tokens,
            "finish_reason": reason,
            "logprobs": None if asked["logprobs"] is None else {"content": content},
            "weight_versions": spans,
        }

    def read(self, model: NumpyQwen3, prompt: tuple[int, ...], name: str | None) -> tuple[np.ndarray, Past]:
        """The logits after a prompt, and its keys and values: those of the cache if it has the prompt."""
        if (name, prompt) not in self.cache or len(prompt) < BLOCK:
            past: Past = {}
            self.cache[name, prompt] = (model.logits(prompt, past), past)
        logits, past = self.cache[name, prompt]
        return logits, dict(past)

    def join(self, info: dict) -> None:
        """Each worker joins the trainer's group, at the same time."""
        assert info["packed"]
        self.packed_bytes = info["packed_buffer_size_bytes"]
        place = (info["master_address"], info["master_port"])
        with ThreadPoolExecutor(self.workers) as executor:
            ranks = range(info["rank_offset"], info["rank_offset"] + self.workers)
            self.groups = list(executor.map(lambda rank: TcpGroup(*place, rank, info["world_size"]), ranks))

    def leave(self) -> None:
        for group in self.groups:
            group.destroy()
        self.groups = []

    def sleep(self) -> None:
        """What it held is lost."""
        self.asleep = {"weights", "kv_cache"}
        self.cache.clear()
        for tensor in self.model.weights.values():
            tensor.fill(np.nan)

    def wake(self, tag: str) -> None:
        assert tag in self.asleep
        assert tag == "weights" or not self.updating  # the memory of keys and values is not needed before
        self.asleep.remove(tag)

    def broadcast(self, info: dict) -> None:
        """An update by broadcasts. A chunk ends with the tensor that makes it larger than the buffer."""
        entries, chunk, size = list(described(info)), [], 0
        for number, entry in enumerate(entries):
            chunk.append(entry)
            size += entry[2]
            if size > self.packed_bytes or number == len(entries) - 1:
                contents = {group.receive() for group in self.groups}
                assert len(contents) == 1  # the same for all workers
                self.unpack(chunk, contents.pop())
                chunk, size = [], 0
                if self.leaves:
                    self.leave()
                    raise RuntimeError("NCCL error")

    def share(self, info: dict) -> None:
        """An update from memory of the ranks on the GPUs of this server."""
        assert os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
        handles = pickle.loads(base64.b64decode(info["ipc_handles_pickled"]))
        contents = set()
        for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(","):
            path, size = handles[f"GPU-{gpu}"]
            assert os.path.getsize(path) == size
            contents.add(Path(path).read_bytes()[: sum(info["tensor_sizes"])])
        assert len(contents) == 1
        entries = list(described(info))
        assert [size for _, _, size in entries] == info["tensor_sizes"]
        self.unpack(entries, contents.pop())

    def unpack(self, entries: list, content: bytes) -> None:
        assert sum(size for _, _, size in entries) == len(content)
        for name, shape, size in entries:
            raw, content = content[:size], content[size:]
            assert self.model.weights[name].shape == shape
            self.model.weights[name] = np.frombuffer(raw, np.float32).reshape(shape).astype(np.float64)
            self.loaded.add(name)

    def update(self, files: dict) -> None:
        if not self.updating:
            raise RuntimeError("no update was started")
        for path, (size, names) in files.items():
            if os.path.getsize(path) != size:
                raise ValueError(f"{path} has {os.path.getsize(path)} bytes, and {size} were written")
            tensors = load_file(path)
            assert sorted(tensors) == sorted(names)
            for name, tensor in tensors.items():
                assert self.model.weights.get(name, tensor).shape == tensor.shape
                self.model.weights[name] = tensor.astype(np.float64)
                self.loaded.add(name)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    engine: Engine
    fault: dict
    backend: str
    sleeps: bool
    asked: dict[str, list[str]]
    broken = False  # after a failed update
    seen: ClassVar[dict[str, int]] = {}

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        path, engine = urlsplit(self.path).path, self.engine
        self.asked = parse_qs(urlsplit(self.path).query)
        self.seen[path] = self.seen.get(path, 0) + 1
        does = self.does(path)
        if does == "exit":
            os._exit(0)
        if does == "hang":
            os.killpg(0, signal.SIGSTOP)
            time.sleep(0.1)
        if does == "status" or self.broken:
            return self.send(500, {"error": "EngineCore encountered an issue"})
        try:
            with nullcontext() if path in ("/is_paused", "/metrics") else engine.lock:
                found = self.act(path, body, does)
        except Exception as error:
            type(self).broken = True
            found = None
            print(f"RuntimeError: {error}", flush=True)
        return self.send(200, found) if found is not None else self.send(500, {"error": "failed"})

    def act(self, path: str, body: dict, does: str | None) -> dict | str:
        engine = self.engine
        match path:
            case "/is_paused":
                return {"is_paused": engine.paused}
            case "/metrics":
                return f'vllm:iteration_tokens_total_sum{{engine="0"}} {engine.computed}\n'
            case "/v1/models":
                return {"data": [{"id": "model", "max_model_len": engine.longest}]}
            case "/weight_info":
                return {"weight_version": engine.version}
            case "/inference/v1/generate":
                assert not engine.updating
                assert not engine.paused
                assert not engine.asleep
                choice = engine.sample(body["token_ids"], body["sampling_params"], body.get("model"))
                if does == "abort":
                    choice |= {"finish_reason": "abort"}
                return {"choices": [choice]}
            case "/pause":
                engine.paused = True
            case "/resume":
                engine.paused = False
            case "/get_world_size":
                return {"world_size": engine.workers}
            case "/shutdown_weight_transfer_engine":
                engine.leave()
            case "/init_weight_transfer_engine":
                info = body["init_info"]
                self.seen["tensors"] = info.get("tensors") or len(engine.model.weights)
                if self.backend == "nccl":
                    engine.join(info)
            case "/sleep":
                assert self.sleeps
                assert self.asked == {"level": ["2"], "mode": ["wait"]}
                engine.sleep()
            case "/wake_up":
                (tag,) = self.asked["tags"]
                engine.wake(tag)
                return {"status": "sleeping" if engine.asleep else "awake", "tags": [tag]}
            case "/start_weight_update":
                assert not engine.updating
                assert "weights" not in engine.asleep
                engine.updating, engine.loaded = True, set()
            case "/update_weights" if self.backend == "nccl":
                engine.leaves = does == "leave"
                engine.broadcast(body["update_info"])
            case "/update_weights" if self.backend == "ipc":
                engine.share(body["update_info"])
            case "/update_weights":
                files = body["update_info"]["files"]
                if does == "truncate":
                    os.truncate(next(iter(files)), 100)
                if does == "stale":
                    engine.loaded |= {name for _, names in files.values() for name in names}
                else:
                    engine.update(files)
            case "/finish_weight_update":
                assert len(engine.loaded) == self.seen["tensors"]
                engine.updating, engine.version = False, body["weight_version"]
            case "/v1/load_lora_adapter":
                engine.load_adapter(body["lora_name"], body["lora_path"])
            case "/v1/unload_lora_adapter":
                del engine.adapters[body["lora_name"]]
            case "/update_weight_version":
                engine.version = body["new_version"]
            case "/reset_prefix_cache":
                if does != "kept":
                    engine.cache.clear()
                return {"success": True}
            case _:
                raise ValueError(path)
        return {"message": "done"}

    def does(self, path: str) -> str | None:
        fault = self.fault
        if fault.get("path") != path or self.seen[path] != fault["count"] or os.path.exists(fault["marker"]):
            return None
        try:
            Path(fault["marker"]).touch(exist_ok=False)
        except FileExistsError:  # another server has met the fault at the same time
            return None
        return fault["do"]

    def send(self, status: int, content: dict | str) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Prints nothing."""


def described(info: dict) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, shape and bytes of each tensor of an update."""
    for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
        assert dtype == "float32"
        yield name, tuple(shape), 4 * int(np.prod(shape))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weight-transfer-config", type=json.loads, default={"backend": "none"})
    parser.add_argument("--enable-sleep-mode", action="store_true")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    for name in ("--model", "--logprobs-mode"):
        parser.add_argument(name)
    for name in ("--port", "--max-model-len"):
        parser.add_argument(name, type=int)
    options, _ = parser.parse_known_args()
    raw = options.logprobs_mode == "raw_logprobs"
    workers = options.tensor_parallel_size
    Handler.engine = Engine(options.model, raw=raw, longest=options.max_model_len, workers=workers)
    Handler.backend, Handler.sleeps = options.weight_transfer_config["backend"], options.enable_sleep_mode
    Handler.fault = json.loads(os.environ.get("STAND_IN_FAULT", "{}"))
    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
