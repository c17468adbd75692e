"""The part of the model on one rank: a pipeline stage of one chunk of layers, or of several with a virtual pipeline.

Axes: T tokens of a call, H hidden size, V vocabulary (this rank's slice).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_paint.mcore.attention import TokenRows
from megatron_paint.models.shape import ModelShape


class Chunk(GPTModel):
    """Consecutive layers of a GPTModel that ends in hidden states: the loss computes the logits.

    `forward` is our own for two reasons: no logits may be computed at prompt positions, and packed rows need a rotary
    position for each token.
    """

    def forward(self, input_ids_T: Tensor, rows: TokenRows) -> Tensor:
        """Hidden states [T, 1, H] of this chunk, after the final norm on the last one.

        Under sequence parallelism T is split over the tensor-parallel ranks. Only the first chunk reads `input_ids_T`;
        the others read the tensor passed to `set_input_tensor`.
        """
        hidden = self.embedding(input_ids_T[None], position_ids=None) if self.pre_process else None
        needs_grad = self.config.recompute_granularity is not None or not len(self.decoder.layers)
        if hidden is not None and needs_grad and torch.is_grad_enabled():
            # A frozen embedding's output requires no gradient. But recomputed layers compute gradients only if their
            # input requires one, and the schedule calls the backward pass of a chunk without layers too.
            hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        return self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self.rotary_angles(rows.position_T),
            packed_seq_params=rows,
        )

    def rotary_angles(self, position_T: Tensor) -> Tensor:
        """Angles [T, 1, 1, head size] of rotary embedding in float32."""
        angles = position_T.float()[:, None, None, None] * self.rotary_pos_emb.inv_freq.float()
        return torch.cat((angles, angles), dim=-1)

    def output_weight(self) -> Tensor:
        """This rank's rows [V, H] of the output layer, or of the embedding if tied; only on the last chunk."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


class Stage:
    """The chunks of one rank. Modules and parameters are named as in the complete model, with its numbers of layers."""

    def __init__(self, chunks: Sequence[Chunk], shape: ModelShape) -> None:
        self.chunks = tuple(chunks)
        self.config = chunks[0].config  # one object for all
        self.valid_vocab_size = shape.vocab_size  # without the rows that pad the vocabulary for tensor parallelism
        # Base and YaRN of the rotary positions, for the records of checkpoints.
        yarn = vars(shape.yarn) if shape.yarn is not None else None
        self.rotary: dict[str, Any] = {"rope_theta": shape.rope_theta, "yarn": yarn}
        # Gathers weights that the last step left on other replicas. Training itself needs it only for the output layer.
        self.complete_weights: Callable[[], None] = lambda: None

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding, or a copy of it."""
        return self.chunks[0].share_embeddings_and_output_weights

    @property
    def has_output(self) -> bool:
        """Whether this rank has the output layer."""
        return self.chunks[-1].post_process

    def output_weight(self) -> Tensor:
        """This rank's rows [V, H] of the output layer, or of the embedding if tied; only on the last stage."""
        return self.chunks[-1].output_weight()

    @property
    def layers(self) -> dict[int, TransformerLayer]:
        """The layers by their index in the complete model, from 0."""
        return {layer.layer_number - 1: layer for chunk in self.chunks for layer in chunk.decoder.layers}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                yield _renumbered(name, _first_layer(chunk)), parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def modules(self) -> Iterator[nn.Module]:
        return (module for chunk in self.chunks for module in chunk.modules())

    def get_submodule(self, name: str) -> nn.Module:
        """A module of a layer, such as decoder.layers.5.mlp."""
        *_, number, inside = name.split(".", 3)
        return self.layers[int(number)].get_submodule(inside)

    def train(self, mode: bool = True) -> None:
        """Sets the mode of all chunks: training, or evaluation."""
        for chunk in self.chunks:
            chunk.train(mode)

    def eval(self) -> None:
        self.train(False)

    def set_is_first_microbatch(self) -> None:
        """Tells Transformer Engine that the weights have changed since the last call."""
        for chunk in self.chunks:
            chunk.set_is_first_microbatch()

    def sharded_state_dict(self, **how: Any) -> dict[str, Any]:
        """Megatron's description of this rank's part of a checkpoint."""
        return {
            _renumbered(name, _first_layer(chunk)): entry
            for chunk in self.chunks
            for name, entry in chunk.sharded_state_dict(**how).items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Fills all chunks. Returns the names of missing and of unexpected entries."""
        missing, wanted = [], set()
        for chunk in self.chunks:
            first = _first_layer(chunk)
            names = {_renumbered(name, first): name for name in chunk.state_dict()}
            wanted |= names.keys()
            mine = {names[name]: value for name, value in state.items() if name in names}
            missing += [_renumbered(name, first) for name in chunk.load_state_dict(mine, strict=False).missing_keys]
        return missing, sorted(state.keys() - wanted)


def _first_layer(chunk: Chunk) -> int:
    """The index in the complete model, from 0, of a chunk's first layer; 0 for a chunk without layers."""
    return chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0


def _renumbered(name: str, first_layer: int) -> str:
    """A name in a chunk whose first layer has this index, as the name in the complete model."""
    if not name.startswith("decoder.layers."):
        return name
    *begin, number, rest = name.split(".", 3)
    return ".".join((*begin, str(int(number) + first_layer), rest))
