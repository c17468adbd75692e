"""A Qwen3 in float64 numpy, dense or a mixture of experts, from a Hugging Face folder: logits after the last token."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

Past = dict[str, tuple[np.ndarray, np.ndarray]]  # keys and values of earlier tokens, by layer


class NumpyQwen3:
    """weights: by Hugging Face name, float64; they may be replaced."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.config = config = json.loads((folder / "config.json").read_text())
        self.weights = {
            name: value.astype(np.float64)
            for file in sorted(folder.glob("*.safetensors"))
            for name, value in load_file(file).items()
        }
        theta = (config.get("rope_parameters") or config)["rope_theta"]
        self.head = config["head_dim"]
        self.inverse_frequencies = theta ** -(np.arange(0, self.head, 2) / self.head)

    def logits(self, ids: Sequence[int], past: Past | None = None) -> np.ndarray:
        """The logits [V] after the last token. past: of the tokens before `ids`; it gets theirs."""
        weights, config = self.weights, self.config
        past = {} if past is None else past
        start = len(next(iter(past.values()))[0]) if past else 0
        x = weights["model.embed_tokens.weight"][list(ids)]
        angles = np.outer(np.arange(start, start + len(ids)), self.inverse_frequencies)
        angles = np.concatenate((angles, angles), axis=1)[:, None]
        cos, sin = np.cos(angles), np.sin(angles)
        mask = np.triu(np.full((len(ids), start + len(ids)), -np.inf), start + 1)
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            x = x + self._attention(name, self._norm(x, name + "input_layernorm"), cos, sin, mask, past)
            y = self._norm(x, name + "post_attention_layernorm")
            mixture = "num_experts" in config or "num_local_experts" in config
            x = x + (self._mixture(name + "mlp.", y) if mixture else self._feed_forward(name + "mlp.", y))
        head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
        return self._norm(x[-1], "model.norm") @ weights[head].T

    def _feed_forward(self, name: str, y: np.ndarray) -> np.ndarray:
        gate, up = (y @ self.weights[f"{name}{which}_proj.weight"].T for which in ("gate", "up"))
        return (gate / (1 + np.exp(-gate)) * up) @ self.weights[name + "down_proj.weight"].T

    def _mixture(self, name: str, y: np.ndarray) -> np.ndarray:
        """Each token's experts, weighed by their probabilities, which sum to 1 if the config says so."""
        logits = y @ self.weights[name + "gate.weight"].T
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        out = np.zeros_like(y)
        for token, row in enumerate(probabilities):
            chosen = np.argsort(-row, kind="stable")[: self.config["num_experts_per_tok"]]
            total = row[chosen].sum() if self.config["norm_topk_prob"] else 1.0
            for expert in chosen:
                part = self._feed_forward(f"{name}experts.{expert}.", y[token : token + 1])[0]
                out[token] += row[expert] / total * part
        return out

    def _attention(
        self, name: str, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, mask: np.ndarray, past: Past
    ) -> np.ndarray:
        def heads(which: str) -> np.ndarray:
            return (x @ self.weights[f"{name}self_attn.{which}_proj.weight"].T).reshape(len(x), -1, self.head)

        def rotated(y: np.ndarray) -> np.ndarray:
            half = self.head // 2
            return y * cos + np.concatenate((-y[..., half:], y[..., :half]), axis=-1) * sin

        q = rotated(self._norm(heads("q"), name + "self_attn.q_norm"))
        k = rotated(self._norm(heads("k"), name + "self_attn.k_norm"))
        repeats = q.shape[1] // k.shape[1]
        k, v = (np.repeat(y, repeats, axis=1) for y in (k, heads("v")))
        if name in past:
            k, v = (np.concatenate(parts) for parts in zip(past[name], (k, v), strict=True))
        past[name] = (k, v)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(self.head) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v)
        return mixed.reshape(len(x), -1) @ self.weights[name + "self_attn.o_proj.weight"].T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scaled = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return scaled * self.weights[name + ".weight"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of one row."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
