"""The description of a model that the trainer and the planner use: sizes and switches. It has no family name."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """Rotary positions that YaRN stretches beyond the length of the pretraining (arXiv 2309.00071).

    Frequencies with more than `beta_fast` turns over the original length are kept. Those with fewer than `beta_slow`
    turns are divided by `factor`. Between the two a linear ramp mixes them.
    """

    factor: float  # from 1: the new length over the original one
    original_positions: int  # length of the pretraining
    attention_factor: float  # cosine and sine are multiplied by it, so attention scores by its square
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ramp begins and ends at whole indices of frequencies


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes and switches of a decoder-only transformer with RMSNorm, SwiGLU and rotary positions."""

    source: str  # path of the config.json that it was read from
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_groups: int  # key-value heads
    head_dim: int
    ffn_size: int
    tied: bool  # the output layer shares the embedding's weight
    qk_norm: bool  # RMSNorm of each query and key head
    qkv_bias: bool
    rope_theta: float
    norm_eps: float
    max_positions: int  # the longest sequence, prompt and response together; with YaRN the stretched length
    dtype: str  # of the stored weights: "bfloat16", "float32", ...
    num_experts: int = 0  # in each layer; 0: a dense model
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    normalise_experts: bool = True  # True: the probabilities of the chosen experts are scaled to sum to 1
    yarn: Yarn | None = None  # None: plain rotary positions

    def vocab_rows(self, ranks: int) -> int:
        """The vocabulary rows of each of `ranks` tensor-parallel ranks; padded at the end if it does not divide."""
        return -(-self.vocab_size // ranks)

    @property
    def num_parameters(self) -> int:
        """The number of weights. A tied embedding counts once."""
        projections = 2 * self.num_heads + 2 * self.num_groups  # query and output; key and value
        attention = self.hidden_size * self.head_dim * projections
        attention += 2 * self.head_dim if self.qk_norm else 0
        attention += self.head_dim * (self.num_heads + 2 * self.num_groups) if self.qkv_bias else 0
        dense = 3 * self.hidden_size * self.ffn_size
        sparse = self.num_experts * self.hidden_size * (1 + 3 * self.expert_ffn_size)
        layer = attention + (sparse if self.num_experts else dense) + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.num_layers * layer + embeddings + self.hidden_size
