"""Seconds of a phase, split by what the GPU does in them."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Seconds:
    """Parts of a time. They follow one another, except where `exposed` has taken the smaller of two away."""

    products: float = 0.0  # matrix products
    attention: float = 0.0
    memory: float = 0.0  # operations that only read and write
    nvlink: float = 0.0  # collectives within a node
    network: float = 0.0  # collectives between nodes
    bubble: float = 0.0  # stages that wait for one another
    host: float = 0.0  # the GPU waits for the host

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(
            self.products + other.products,
            self.attention + other.attention,
            self.memory + other.memory,
            self.nvlink + other.nvlink,
            self.network + other.network,
            self.bubble + other.bubble,
            self.host + other.host,
        )

    def __rmul__(self, factor: float) -> "Seconds":
        return Seconds(
            factor * self.products,
            factor * self.attention,
            factor * self.memory,
            factor * self.nvlink,
            factor * self.network,
            factor * self.bubble,
            factor * self.host,
        )

    @property
    def total(self) -> float:
        """All parts together."""
        return self.products + self.attention + self.memory + self.nvlink + self.network + self.bubble + self.host

    def exposed(self, hidden: float) -> "Seconds":
        """What is left of communication after `hidden` seconds of it ran beside other work."""
        total = self.total
        return (max(0.0, total - hidden) / total) * self if total else self

    def parts(self) -> dict[str, float]:
        """The parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
