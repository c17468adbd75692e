"""Reads a PEFT adapter, and a base checkpoint with the adapter merged, slice by slice.

Axes: K rank of the adapter, I inputs, O outputs of a weight.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError, about
from megatron_paint.checkpoints.hf_reader import EMBEDDING, HEAD
from megatron_paint.checkpoints.peft import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    PROJECTIONS,
    STACKED,
    adapter_name,
    read_adapter_config,
)
from megatron_paint.checkpoints.stacked_adapters import expert_weight, of_expert, stacked_key, unpacked
from megatron_paint.config.settings import LoraSettings, ModelSettings
from megatron_paint.models.qwen3.mapping import hugging_face_shapes
from megatron_paint.models.shape import ModelShape

PREFIX, SHOWN = "base_model.model.", 3
Read = Callable[..., Tensor]  # read(name, rows=slice, columns=slice | None) returns that part of the tensor


class Adapter:
    """The tensors of a PEFT adapter for a model of `shape`.

    UserError: the file is missing or damaged, or its tensors do not fit the model or the config.
    """

    def __init__(self, folder: str | Path, shape: ModelShape):
        self.folder, self.shape = Path(folder), shape
        self.config = read_adapter_config(folder)
        self.weights = hugging_face_shapes(shape)
        self._file = self._opened()
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in self._file.keys():  # noqa: SIM118 (not a dictionary)
            self._shapes[name.removesuffix(".weight")] = tuple(self._file.get_slice(name).get_shape())
        self._stored = {name.removesuffix(".weight"): name for name in self._file.keys()}  # noqa: SIM118
        self.adapted = {
            weight for weight in self.weights if self._key(weight, "A") in self._stored or self._is_stacked(weight)
        }
        # The stacked parameter that was read last, because the experts of a layer are asked for one after another.
        self._pairs: tuple[tuple[int, str] | None, tuple[Tensor, ...]] = (None, ())
        self.saved = {weight for weight in self.weights if PREFIX + _module(weight) in self._stored}
        self._check()

    def pair(self, weight: str) -> tuple[Tensor, Tensor] | None:
        """A [K, I] and B [O, K] of a Hugging Face weight, unscaled; None if it has no adapter."""
        if weight not in self.adapted:
            return None
        if self._is_stacked(weight):
            place = expert_weight(weight)
            return of_expert(place, *self.expert_pairs(place.layer, place.stacked))
        return self._tensor(self._key(weight, "A")), self._tensor(self._key(weight, "B"))

    def expert_pairs(self, layer: int, stacked: str) -> tuple[Tensor, Tensor] | None:
        """A [E, K, I] and B [E, O, K] of a stacked parameter of all experts of a layer; None if it has no adapter."""
        if stacked not in self.config.stacked:
            return None
        keys = (self._stacked_key(layer, stacked, side) for side in "AB")
        if self._pairs[0] != (layer, stacked):
            experts = self.shape.num_experts
            pair = tuple(unpacked(side, self._tensor(key), experts) for side, key in zip("AB", keys, strict=True))
            self._pairs = (layer, stacked), pair
        return self._pairs[1]

    def scale(self, weight: str) -> float:
        """The factor of B A."""
        return self.config.scale_of(self._adapted_module(weight))

    def _is_stacked(self, weight: str) -> bool:
        """Whether a weight is of an expert whose adapters are stored with those of all experts of the layer."""
        place = expert_weight(weight)
        return place is not None and place.stacked in self.config.stacked

    def _adapted_module(self, weight: str) -> str:
        """What PEFT adapts: the module of a weight, or the stacked parameter."""
        if not self._is_stacked(weight):
            return _module(weight)
        place = expert_weight(weight)
        return f"model.layers.{place.layer}.mlp.experts.{place.stacked}"

    def _stacked_key(self, layer: int, stacked: str, side: str) -> str:
        return stacked_key(layer, stacked, side, targets=self.config.stacked).removesuffix(".weight")

    def merged(self, read: Read) -> Read:
        """Returns a reader of the base's tensors, read with `read`, with the adapter merged in float32.

        W becomes W + scale B A. With DoRA (arXiv 2402.09353) each row is then scaled to the stored length.
        """
        return lambda name, *, rows=slice(None), columns=None: self._read(read, name, rows, columns)

    def _read(self, read: Read, name: str, rows: slice, columns: slice | None) -> Tensor:
        if name in self.saved:
            values = self._tensor(PREFIX + _module(name))[rows]
            return values if columns is None else values[:, columns].contiguous()
        if name not in self.adapted:
            return read(name, rows=rows, columns=columns)
        if self._base_layer(name) in self._stored:
            read = self._stored_base
        a_KI, b_OK = (values.float() for values in self.pair(name))
        if self.config.dora:  # the length of a row needs all its columns
            values = read(name, rows=rows).float() + self.scale(name) * (b_OK[rows] @ a_KI)
            lengths = self._tensor(self._magnitude(name))[rows].float() / values.norm(dim=1)
            values = values * lengths[:, None]
            return values if columns is None else values[:, columns].contiguous()
        if columns is not None:
            a_KI = a_KI[:, columns]
        return read(name, rows=rows, columns=columns).float() + self.scale(name) * (b_OK[rows] @ a_KI)

    def _stored_base(self, name: str, *, rows: slice, columns: slice | None = None) -> Tensor:
        values = self._tensor(self._base_layer(name))[rows]
        return values if columns is None else values[:, columns]

    def _opened(self) -> Any:
        path = self.folder / ADAPTER_FILE
        if not path.is_file() and (self.folder / "adapter_model.bin").is_file():
            raise UserError(f"{self.folder} has adapter_model.bin; save the adapter as safetensors with PEFT first")
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise UserError(
                f"{self.folder} has {ADAPTER_CONFIG} but no {ADAPTER_FILE}; copy the adapter again"
            ) from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is truncated or not a safetensors file ({error}); copy it again") from None

    def _tensor(self, key: str) -> Tensor:
        return self._file.get_tensor(self._stored[key])

    @staticmethod
    def _key(weight: str, side: str) -> str:
        return adapter_name(weight, side).removesuffix(".weight")

    @staticmethod
    def _base_layer(weight: str) -> str:
        """PEFT also saves the frozen weight of an adapted output layer, and reads it back."""
        return f"{PREFIX}{_module(weight)}.base_layer"

    @staticmethod
    def _magnitude(weight: str) -> str:
        return f"{PREFIX}{_module(weight)}.lora_magnitude_vector"

    def _check(self) -> None:
        if self.config.stacked and not self.shape.num_experts:
            raise UserError(
                f"{self.folder / ADAPTER_CONFIG}: target_parameters names experts, and {self.shape.source} has none; "
                "give the base that the adapter was trained on"
            )
        if self.shape.tied:
            self._check_tied()
        expected = self._expected()
        missing = [f"{key} is missing" for key in sorted(expected.keys() - self._shapes.keys())]
        surplus = [
            f"{key} belongs to no weight that can be adapted" for key in sorted(self._shapes.keys() - expected.keys())
        ]
        shapes = [
            f"{key} has shape {self._shapes[key]}, but config and model expect {wanted}"
            for key, wanted in expected.items()
            if key in self._shapes and self._shapes[key] != wanted
        ]
        if problems := missing + surplus + shapes:
            more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise UserError(
                f"{self.folder} is not an adapter of {self.shape.source}: {'; '.join(problems[:SHOWN])}{more}"
            )
        if not self.adapted | self.saved:
            raise UserError(f"{self.folder / ADAPTER_FILE} holds no adapter of {self.shape.source}")

    def _check_tied(self) -> None:
        """UserError unless embedding and output layer remain one weight. PEFT may save a copy of it for each."""
        embedding, head = PREFIX + _module(EMBEDDING), PREFIX + _module(HEAD)
        copies = {embedding, head} & self._stored.keys()
        separate = [weight for weight in (EMBEDDING, HEAD) if _ends_with(weight, self.config.saved_modules)]
        separate += [key for key in self._stored if key.startswith((f"{embedding}.", f"{head}."))]
        if len(copies) == 2 and not torch.equal(self._tensor(embedding), self._tensor(head)):
            separate.append(HEAD)
        if separate:
            raise UserError(
                f"{self.folder} changes {separate[0]}, but {self.shape.source} ties embedding and output layer: merge "
                "the adapter with PEFT, set tie_word_embeddings to false, and give the merged model"
            )
        if len(copies) == 2:
            del self._stored[head], self._shapes[head]

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that belong to the adapted weights, to the targets and to modules_to_save."""
        expected: dict[str, tuple[int, ...]] = self._expected_stacked()
        for weight, shape in self.weights.items():
            if self._is_stacked(weight):
                continue
            if weight in self.saved or _ends_with(weight, self.config.saved_modules):
                expected[PREFIX + _module(weight)] = shape
            elif len(shape) == 2 and (self._is_targeted(weight) or _ends_with(weight, self.config.targets)):
                rank = self.config.rank_of(_module(weight))
                expected[self._key(weight, "A")] = (rank, shape[1])
                expected[self._key(weight, "B")] = (shape[0], rank)
                if self._base_layer(weight) in self._stored:
                    expected[self._base_layer(weight)] = shape
                if self.config.dora:
                    expected[self._magnitude(weight)] = shape[:1]
        return expected

    def _expected_stacked(self) -> dict[str, tuple[int, ...]]:
        hidden, ffn, experts = self.shape.hidden_size, self.shape.expert_ffn_size, self.shape.num_experts
        sizes = {"gate_up_proj": (hidden, 2 * ffn), "down_proj": (ffn, hidden)}
        expected = {}
        for layer in range(self.shape.num_layers if experts else 0):
            for stacked in self.config.stacked:
                rank = experts * self.config.rank_of(f"model.layers.{layer}.mlp.experts.{stacked}")
                inputs, outputs = sizes[stacked]
                expected[self._stacked_key(layer, stacked, "A")] = (rank, inputs)
                expected[self._stacked_key(layer, stacked, "B")] = (outputs, rank)
        return expected

    def note(self, lora: LoraSettings | None) -> str:
        """The line that says what becomes of the adapter. lora: that of the run; None: the adapter is merged."""
        if lora is None:
            return f"the adapter {self.folder} is merged into the weights of {Path(self.shape.source).parent}"
        new = len(self.missing(lora))
        rest = (
            f"; {count_text(new, 'projection')} that it leaves out {agreeing(new, 'starts', 'start')} new"
            if new
            else ""
        )
        return f"the adapters continue from {self.folder}{rest}"

    def _is_targeted(self, weight: str) -> bool:
        return weight in self.adapted or self._key(weight, "B") in self._stored

    def check_continues(self, lora: LoraSettings) -> None:
        """UserError unless the adapters of a run can continue from these."""
        rank, alpha = lora.rank, lora.alpha
        merge = "leave model.lora out to merge the adapter into the weights"
        if self.config.dora:
            raise UserError(f"{self.folder} has use_dora, and a run of adapters cannot continue from it; {merge}")
        if self.saved:
            raise UserError(
                f"{self.folder} holds the complete weights of {min(self.saved)} (modules_to_save), which a run of "
                f"adapters does not train; {merge}"
            )
        sizes = {weight: (self.config.rank_of(_module(weight)), self.scale(weight)) for weight in sorted(self.adapted)}
        if other := [weight for weight in sizes if weight.split(".")[-2] not in PROJECTIONS]:
            raise UserError(f"{self.folder} adapts {other[0]}, which a run of adapters cannot; {merge}")
        if single := [weight for weight in sizes if expert_weight(weight) and not self._is_stacked(weight)]:
            raise UserError(
                f"{self.folder} adapts {single[0]} without the other experts of its layer. A run adapts all experts of "
                f"a layer together (target_parameters of transformers 5); {merge}"
            )
        if self.config.stacked and not lora.experts:
            raise UserError(f"{self.folder} has adapters on experts: set model.lora.experts=true, or {merge}")
        if len(set(sizes.values())) > 1:
            raise UserError(f"{self.folder} has modules of different rank or scale, and a run has one of each; {merge}")
        ((own_rank, scale),) = set(sizes.values())
        if own_rank != rank or not math.isclose(scale, alpha / rank, rel_tol=1e-6):
            raise UserError(
                f"{self.folder} has rank {own_rank} and scale {scale:g}, but model.lora has rank {rank} and scale "
                f"alpha / rank = {alpha / rank:g}: set model.lora.rank={own_rank} "
                f"model.lora.alpha={scale * own_rank:.10g}, or {merge}"
            )

    def missing(self, lora: LoraSettings) -> tuple[str, ...]:
        """What a run adapts and this adapter does not, such as model.layers.0.mlp.up_proj."""
        names = [
            weight for weight in self.weights if weight.split(".")[-2] in PROJECTIONS and not expert_weight(weight)
        ]
        missing = [_module(weight) for weight in names if weight not in self.adapted]
        if lora.experts:
            new = [stacked for stacked in STACKED if stacked not in self.config.stacked]
            missing += [f"model.layers.{n}.mlp.experts.{name}" for n in range(self.shape.num_layers) for name in new]
        return tuple(missing)


def checked_adapter(model: ModelSettings, shape: ModelShape) -> Adapter | None:
    """The adapter at model.adapter_path, if there is one. UserError: it does not fit the model or model.lora."""
    if model.adapter_path is None:
        return None
    with about("model.adapter_path"):
        adapter = Adapter(model.adapter_path, shape)
        if model.lora is not None:
            adapter.check_continues(model.lora)
    return adapter


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def _ends_with(weight: str, modules: tuple[str, ...]) -> bool:
    """Whether a weight is of one of the modules, which PEFT names by the end of their path."""
    return any(_module(weight) == name or _module(weight).endswith(f".{name}") for name in modules)
