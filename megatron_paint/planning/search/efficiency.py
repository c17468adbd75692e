"""What real programs reach of the peaks of data sheets. Each figure has its source; docs/planner.md compares them.

"Fitted" means: chosen so that a published training speed is met. "Ours" means: an assumption, not measured.
"""

# Matrix products of many rows, of the peak. Bfloat16: fitted to 512.7 TFLOP/s of Qwen3-8B on 16 H100 (Megatron-Bridge,
# card of qwen3-8b). FP8, casts included: fitted to 744 TFLOP/s of Llama3-8B on H100 (Megatron-Bridge 25.11).
PRODUCTS = {"bf16": 0.64, "fp8": 0.55}
# Grouped products of experts, imbalance included: fitted to 199 TFLOP/s (bfloat16) and to 8,826 tokens/s (FP8) of
# Qwen3-30B-A3B on 16 H100 (Megatron-Bridge, card and page of speeds).
EXPERT_PRODUCTS = {"bf16": 0.35, "fp8": 0.18}
# Rows at which a product reaches half of that: tiles and waves that are not full. Ours.
HALF_ROWS = 128
# Attention, forward and backward together: FlashAttention-3 reports up to 0.65 forward and 0.55 backward with causal
# masks and long rows (arXiv 2407.08608); shorter rows reach less.
ATTENTION = 0.45
ATTENTION_BACKWARD = 2.5  # products of the backward pass over those of the forward pass (arXiv 2307.08691)
# Bytes/s of operations that only read and write, of links, and of Adam in host memory. Ours; NVLink's and the network's
# are usual values of nccl-tests for large messages.
HBM = 0.80
NVLINK = 0.75
NETWORK = 0.75
HOST = 0.70
HOST_MEMORY = 0.50
# Seconds that a collective takes in addition to its bytes. Ours.
LATENCY = {"nvlink": 10e-6, "network": 50e-6}
# Seconds in which the host starts the kernels of a dense layer and of one with experts, by what samples or trains. A
# layer never takes less. "trainer": PyTorch without CUDA graphs; "vllm": with them. Ours.
HOST_PER_LAYER = {"trainer": (0.6e-3, 1.5e-3), "vllm": (0.06e-3, 0.12e-3)}
HOST_PER_TOKEN = {"trainer": 2.0e-3, "vllm": 3.0e-3}  # seconds of a decoding step beside its layers: sampling, records
# Fraction of the last micro-batch's backward pass in which gradients can be reduced (overlap_grad_reduce). Ours.
OVERLAP = 0.8
# Bytes that the optimiser reads and writes for each weight of its shard: float32 gradient, main weight and two moments
# read, the last three written, bfloat16 weight written. By counting.
OPTIMIZER_BYTES = 4 + 3 * 4 * 2 + 2
# Passes over float32 logits in the loss, for each of student and teacher, backward pass included. By counting.
LOGIT_PASSES = 5
# Passes over what is sent to experts for gathering and scattering it, forward. By counting: read and write, twice.
PERMUTATION_PASSES = 6
