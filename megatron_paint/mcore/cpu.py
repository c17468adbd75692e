"""Lets Megatron-Core run on a machine without CUDA, over gloo; does nothing if there is a GPU.

Megatron-Core 0.16 and 0.19 assume CUDA in a handful of places: device queries, streams and events, `device="cuda"`
keywords, tensor type names, the CUDA random state. Only this file redirects each to its CPU counterpart.
"""

from collections.abc import Callable
from functools import wraps

import torch

# Functions that make tensors. A `TorchFunctionMode` sees all functions: a sixth of a small model's CPU time.
_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like"),
    *("rand", "randint", "randn", "tensor", "zeros", "zeros_like"),
)
_is_redirected = False


class _NoEvent:
    """Replaces a CUDA event: a CPU runs everything in order."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        pass

    wait = synchronize = record

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


class _NoStream:
    """Replaces a CUDA stream, and the context manager torch.cuda.stream(...): a CPU runs everything in order."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, *args):
        pass

    wait_event = synchronize = wait_stream

    def record_event(self, *args):
        return _NoEvent()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


def redirect_cuda_to_cpu() -> None:
    """Makes Megatron-Core's CUDA calls use the CPU. Does nothing if there is a GPU, or at a second call."""
    global _is_redirected
    if torch.cuda.is_available() or _is_redirected:
        return
    _redirect_torch_cuda()
    _redirect_device_keywords()
    _redirect_random_state()
    _redirect_experts()
    _redirect_uneven_parts()
    _is_redirected = True


def _redirect_device_keywords() -> None:
    """Turns `device="cuda"` keywords into CPU: pipeline schedules allocate their buffers with it."""
    with torch.device("cpu"):
        torch.empty(0)  # torch.device, as a context, now knows the functions themselves
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(make)
    def made(*args, **kwargs):
        if (device := kwargs.get("device")) is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return made


def _redirect_torch_cuda() -> None:
    # A separate function for each: torch's compiler keeps a table of functions and refuses one with two names.
    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.set_device = lambda *args, **kwargs: None
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.Event, cuda.Stream = _NoEvent, _NoStream
    cuda.current_stream = lambda *args, **kwargs: _NoStream()
    cuda.default_stream = lambda *args, **kwargs: _NoStream()
    cuda.stream = lambda *args, **kwargs: _NoStream()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = lambda self, *args: None
    tensor_type = torch.Tensor.type

    def cuda_type_name(self, dtype=None, *args, **kwargs):
        # The optimisers sort parameters by comparing type() with "torch.cuda.*Tensor".
        if dtype is not None:
            return tensor_type(self, dtype, *args, **kwargs)
        name = tensor_type(self)
        return name if name.startswith("torch.cuda") else name.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type_name


def _redirect_random_state() -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    def set_state(state, device=-1, graph_safe=False):
        torch.set_rng_state(state)

    megatron_random._set_cuda_rng_state = set_state
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()


def _redirect_experts() -> None:
    """Megatron's MoE layers expect Transformer Engine's GEMM for the router, and pass split sizes as tensors."""
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    all_to_all = torch.distributed.all_to_all_single

    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, *args, **kwargs):
        sizes = (None if s is None else [int(n) for n in s] for s in (output_split_sizes, input_split_sizes))
        return all_to_all(output, input, *sizes, *args, **kwargs)

    torch.distributed.all_to_all_single = all_to_all_single


def _redirect_uneven_parts() -> None:
    """Pads parts of different sizes to the largest one: gloo gathers and reduces only parts of one size.

    Megatron's dispatcher of tokens has such parts if several ranks share an expert.
    """
    import megatron.core.tensor_parallel.mappings as mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        most = max(output_split_sizes)
        parts = input_.new_empty((group.size(), most, *input_.shape[1:]))
        if most:
            torch.distributed.all_gather_into_tensor(parts.flatten(0, 1), _padded(input_, most), group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def reduce_scatter_uneven(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        most = max(input_split_sizes)
        mine = input_.new_empty((most, *input_.shape[1:]))
        if most:
            parts = torch.cat([_padded(part, most) for part in input_.split(input_split_sizes)])
            torch.distributed.reduce_scatter_tensor(mine, parts, group=group)
        return mine[: input_split_sizes[group.rank()]]

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_uneven, reduce_scatter_uneven


def _padded(part: torch.Tensor, size: int) -> torch.Tensor:
    """The part with rows of zeros at its end, `size` rows together."""
    return torch.cat((part, part.new_zeros((size - len(part), *part.shape[1:]))))
