"""Compiles the Triton kernels for a Hopper GPU, on any machine; exits with an error where one does not."""

from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_paint.losses.elementwise.divergences import DIVERGENCES
from megatron_paint.losses.elementwise.triton_kernels import (
    divergence_kernel,
    statistics_kernel,
    token_gradient_kernel,
    token_statistics_kernel,
)

TARGET = GPUTarget("cuda", 90, 32)
BLOCK = 2048


def compile_kernel(kernel, pointers: dict[str, str], **constants) -> None:
    signature = {}
    for name in kernel.arg_names:
        if name in pointers:
            signature[name] = pointers[name]
        elif name.isupper():
            signature[name] = "constexpr"
        else:
            signature[name] = "i32" if name.endswith(("stride", "columns")) else "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs={**constants, "BLOCK": BLOCK})
    assert triton.compile(source, target=TARGET, options={"num_warps": 8}).asm["cubin"]


def main() -> None:
    for logits, gradient, full in (("*fp32", "*bf16", True), ("*bf16", "*fp32", False)):
        pointers = {name: logits for name in ("student_ptr", "teacher_ptr", "partner_ptr", "deciding_ptr")}
        statistics = {"MIXED": True, "FULL_TEACHER": full, "HEATED": full}
        for support in (False, True):
            made = {"floor_ptr": "*fp32", "packed_ptr": "*fp32"}
            compile_kernel(statistics_kernel, pointers | made, SUPPORT=support, **statistics)
        pointers |= {"normalisers_ptr": "*fp32", "sums_ptr": "*fp32", "dlogits_ptr": gradient}
        for divergence, support in product(DIVERGENCES, (False, True)):
            flags = {
                "CLIPPED": full and divergence == "forward_kl",
                "MIXED": True,
                "FULL_TEACHER": full,
                "SUPPORT": support and divergence != "reverse_kl",
                "SUMS": True,
                "GRADIENT": True,
            }
            compile_kernel(divergence_kernel, pointers, DIVERGENCE=divergence, **flags)
        compile_kernel(token_statistics_kernel, {"logits_ptr": logits, "packed_ptr": "*fp32"})
        pointers = {"logits_ptr": logits, "token_ptr": "*i64", "given_ptr": "*fp32", "dlogits_ptr": gradient}
        compile_kernel(token_gradient_kernel, pointers)


if __name__ == "__main__":
    main()
