"""A stand-in for CUDA graphs on a CPU: a replay runs the captured function again, into the result of the capture."""

from collections.abc import Callable

from torch import Tensor


class EagerCapture:
    def __init__(self) -> None:
        self.captures, self.replays = 0, 0

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captures += 1
        function()  # as before a real capture
        result = function().clone()

        def replay() -> Tensor:
            self.replays += 1
            return result.copy_(function())

        return replay
