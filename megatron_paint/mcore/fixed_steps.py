"""Decoding steps in fixed tensors, which CUDA can capture as graphs: one launch in place of hundreds of kernels.

A graph runs the same kernels on the same memory each time. So a step copies its inputs to fixed tensors, and it attends
to a fixed number of positions: a bucket that covers those of all rows. What lies behind a row's position is masked.

Axis: L rows that are decoded.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BUCKET = 256  # positions; ours, not measured on a GPU

# Hidden states after a step: last tokens [L], their positions [L], one past the largest position of a row.
Step = Callable[[Tensor, Tensor, int], Tensor]
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class FixedSteps:
    """A `Step` that captures another one for each bucket, when it first needs it, and replays it from then on.

    step: is called with the fixed tensors alone. It must wait for nothing on the host. length: positions of the cache
    that `step` reads and writes; the cache must stay where it is. The result of a call is overwritten by the next call.
    """

    def __init__(
        self,
        step: Step,
        *,
        rows: int,
        length: int,
        device: torch.device,
        capture: Capture,
        bucket: int,
    ) -> None:
        self.step, self.capture = step, capture
        self.length, self.bucket = length, bucket
        self.input_L = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position_L = torch.zeros(rows, dtype=torch.int64, device=device)
        self.replays: dict[int, Callable[[], Tensor]] = {}  # by the end of the bucket

    def __call__(self, input_L: Tensor, position_L: Tensor, end: int) -> Tensor:
        self.input_L.copy_(input_L)
        self.position_L.copy_(position_L)
        end = min(-(-end // self.bucket) * self.bucket, self.length)
        if end not in self.replays:
            self.replays[end] = self.capture(lambda: self.step(self.input_L, self.position_L, end))
        return self.replays[end]()


class CudaCapture:
    """Captures functions as CUDA graphs. They share memory, so a result must be read before the next graph runs.

    Not measured on a GPU.
    """

    def __init__(self) -> None:
        self.pool: tuple[int, int] | None = None

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            function()  # the first call of a kernel may load it, which no graph can. The replay writes the same again
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog, another thread, may query its events meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = function()
        self.pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
