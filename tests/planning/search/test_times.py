"""Times by hand: each expected number is written out with figures of a data sheet and docs/planner.md's factors."""

from dataclasses import replace

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.planning.search.candidate import Candidate
from megatron_paint.planning.search.layer_time import LayerTime
from megatron_paint.planning.search.links import Group
from megatron_paint.planning.search.machines import known_gpus
from megatron_paint.planning.search.rollout_time import RolloutTime, server_layout, transfer
from megatron_paint.planning.search.seconds import Seconds
from megatron_paint.planning.search.sizes import find_model
from megatron_paint.planning.search.training_time import Batch, Loss, TrainingTime
from megatron_paint.planning.search.workload import Workload
from tests.planning.search.asked import ask

H100 = known_gpus()["h100-80"]
SHAPE = find_model("qwen3_8b")[1]
# Qwen3-8B: H 4096, 32 heads and 8 groups of 128, F 12288.
WEIGHTS = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288
PRODUCTS, ATTENTION, HBM, NVLINK, NETWORK = 989e12 * 0.64, 989e12 * 0.45, 3.35e12 * 0.80, 450e9 * 0.75, 50e9 * 0.75


def layer(**options) -> LayerTime:
    options = {"layout": Candidate(), **options}
    return LayerTime(shape=SHAPE, gpu=H100, **options)


def test_one_dense_layer():
    """16,384 tokens in rows of 4,096: a token sees 2,048 on average."""
    forward = layer().forward(16384, 2048)
    assert forward.products == pytest.approx(2 * WEIGHTS * (16384 + 128) / PRODUCTS)
    assert forward.attention == pytest.approx(4 * 16384 * 2048 * 4096 / ATTENTION)
    numbers = 10 * 4096 + 4 * (4096 + 1024) + 3 * 12288
    assert forward.memory == pytest.approx(16384 * numbers * 2 / HBM)
    assert (forward.nvlink, forward.network, forward.host) == (0, 0, 0)
    # About 10 ms of products at 633 TFLOP/s.
    assert forward.total == pytest.approx(0.0125, rel=0.005)


def test_one_backward_pass():
    forward, backward = layer().forward(16384, 2048), layer().backward(16384, 2048)
    assert backward.products == pytest.approx(2 * forward.products)
    assert backward.attention == pytest.approx(2.5 * forward.attention)
    assert backward.memory == pytest.approx(2 * forward.memory)


def test_adapters_need_no_gradients_of_the_weights():
    """LoRA 64: five A of 4096 inputs with outputs 4096 + 2 x 1024 + 2 x 12288, two B of 4096 outputs."""
    found = layer(lora_rank=64).backward(16384, 2048)
    adapters = 64 * ((4096 + 2 * 1024 + 2 * 12288) + (4096 + 12288) + 7 * 4096)
    expected = (2 * WEIGHTS + 2 * 2 * adapters) * (16384 + 128) / PRODUCTS
    assert found.products == pytest.approx(expected)


def test_tensor_parallel_collectives():
    """Two all-gathers and two reduce-scatters of 16,384 x 4,096 numbers of 2 bytes, within a node."""
    found = layer(layout=Candidate(tp=2)).forward(16384, 2048)
    assert found.nvlink == pytest.approx(4 * (16384 * 4096 * 2 / 2 / NVLINK + 10e-6))
    assert found.products == pytest.approx(WEIGHTS * (16384 + 128) / PRODUCTS)


def test_a_group_over_nodes_uses_the_network_cards_of_all_its_ranks():
    """16 ranks on two nodes, 1 GB in total: a node receives half of it through eight cards."""
    found = Group(gpu=H100, ranks=16, stride=1).gather(1e9)
    assert found.nvlink == pytest.approx(1e9 * 7 / 8 / NVLINK)
    assert found.network == pytest.approx(1e9 / 2 / (8 * NETWORK) + 50e-6)
    alone = Group(gpu=H100, ranks=2, stride=8).gather(1e9)  # one rank on each node
    assert (alone.nvlink, alone.network) == (0, pytest.approx(1e9 / 2 / NETWORK + 50e-6))


def test_an_exchange_over_nodes():
    """16 ranks: of what a rank sends, 7/16 stay on its node and 8/16 leave it."""
    found = Group(gpu=H100, ranks=16, stride=1).exchange(1e9)
    assert found.nvlink == pytest.approx(1e9 * 7 / 16 / NVLINK)
    assert found.network == pytest.approx(1e9 * 8 / 16 / NETWORK + 50e-6)


def test_experts_of_a_layer():
    """30B-A3B, EP 8 within a node: every token goes to 8 experts of 3 x 2048 x 768 weights."""
    shape = find_model("qwen3_30b_a3b")[1]
    moe = LayerTime(shape=shape, gpu=H100, layout=Candidate(dp=8, ep=8))
    found = moe.forward(16384, 2048)
    shared = 2 * 2048 * 4096 + 2 * 2048 * 512
    products = 2 * shared * (16384 + 128) / PRODUCTS
    experts = 2 * 3 * 2048 * 768 * 8 * 16384 / (989e12 * 0.35)
    assert found.products == pytest.approx(products + experts)
    assert found.nvlink == pytest.approx(2 * (16384 * 8 * 2048 * 2 * 7 / 8 / NVLINK + 10e-6))


def test_the_bubble_of_a_pipeline():
    """8 micro-batches through 4 stages of 9 layers: 3 stages wait once, or half as long with two chunks a stage."""
    batch, loss = Batch(sequences=8, length=4096, micro_batch_tokens=4096), Loss(tokens=0, products=0, logit_sets=0)
    found = {}
    for vpp in (1, 2):
        times = TrainingTime(layer=layer(layout=Candidate(pp=4, vpp=vpp)), overlap=False)
        found[vpp] = times.student(batch, loss)
    each = layer(layout=Candidate(pp=4)).forward(4096, 2048) + layer(layout=Candidate(pp=4)).backward(4096, 2048)
    sent = 2 * 4096 * 4096 * 2 / NVLINK + 2 * 10e-6
    assert found[1].bubble == pytest.approx(3 * (9 * each.total + sent))
    assert found[1].products == pytest.approx(8 * 9 * each.products)
    assert found[2].bubble == pytest.approx(3 / 2 * (9 * each.total + 2 * sent))


def test_a_virtual_pipeline_takes_as_many_micro_batches_as_stages():
    """5 micro-batches through 4 stages with two chunks each take the time of 8."""
    times = TrainingTime(layer=layer(layout=Candidate(pp=4, vpp=2)), overlap=False)
    loss = Loss(tokens=0, products=0, logit_sets=0)
    found = [times.student(Batch(sequences=n, length=4096, micro_batch_tokens=4096), loss).total for n in (5, 8, 9)]
    assert found[0] == pytest.approx(found[1])
    assert found[2] > 1.3 * found[1]


def test_the_loss_is_on_the_last_stage():
    """4,096 tokens: three products with 151,936 x 4,096 weights, and five passes over float32 logits."""
    times = TrainingTime(layer=layer(), overlap=False)
    found = times.loss(4096, Loss(tokens=4096, products=3, logit_sets=1))
    assert found.products == pytest.approx(3 * 2 * 151936 * 4096 * (4096 + 128) / PRODUCTS)
    assert found.memory == pytest.approx(5 * 4096 * 151936 * 4 / HBM)


def test_gradients_and_the_optimiser():
    """8 replicas of 36 layers and two tables within a node: float32 gradients, bfloat16 weights, 30 bytes a weight."""
    times = TrainingTime(layer=layer(layout=Candidate(dp=8)), overlap=False)
    weights = 36 * WEIGHTS + 2 * 151936 * 4096
    batch = Batch(sequences=8, length=4096, micro_batch_tokens=4096)
    assert times.reduction(batch).nvlink == pytest.approx(weights * (4 + 2) * 7 / 8 / NVLINK + 20e-6, rel=1e-6)
    assert times.optimizer().memory == pytest.approx(weights / 8 * 30 / HBM)
    # 64 GB/s and 77 GB/s of a GPU's share, of which 0.7 and 0.5 are reached.
    on_host = TrainingTime(layer=layer(layout=Candidate(dp=8)), overlap=False, on_host=True).optimizer()
    assert on_host.total == on_host.host == pytest.approx(weights / 8 * (8 / 44.8e9 + 30 / 38.5e9))
    groups = TrainingTime(layer=layer(layout=Candidate(dp=8)), overlap=False, instances=2)  # of four replicas each
    assert groups.optimizer().memory == pytest.approx(weights / 4 * 30 / HBM)
    hidden = TrainingTime(layer=layer(layout=Candidate(dp=8)), overlap=True).reduction(batch)
    assert hidden.nvlink == pytest.approx(weights * 2 * 7 / 8 / NVLINK + 10e-6, rel=1e-6)  # the weights remain


def test_micro_batches_are_as_even_as_sequences_allow():
    times = TrainingTime(layer=layer(layout=Candidate(dp=2)), overlap=False)
    batch = Batch(sequences=20, length=1000, micro_batch_tokens=4500)  # 10 of a replica, 4 together
    assert times.micro_batches(batch) == (3, pytest.approx(10 / 3 * 1000))
    assert times.micro_batches(replace(batch, micro_batch_tokens=500)) == (10, 1000)


def test_a_decoding_step_of_a_server_reads_the_weights():
    """One row of 8B: 36 layers of weights and keys, and the output layer. The host is faster than the memory."""
    times = RolloutTime(layer=layer(), host="vllm", replicas=1, rows=1, cache_bytes=1e10)
    found = times.token(1, 1000)
    assert found.products == pytest.approx((36 * WEIGHTS + 151936 * 4096) * 2 / HBM)
    assert found.attention == pytest.approx(36 * 1000 * 2 * 1024 * 2 / HBM)
    assert found.host == pytest.approx(3e-3)


def test_a_decoding_step_of_the_trainer_waits_for_the_host():
    times = RolloutTime(layer=layer(), host="trainer", replicas=1, rows=1, cache_bytes=1e10)
    token = times.token(1, 1000)
    rest = 151936 * 4096 * 2 / HBM + 2e-3
    assert token.total == pytest.approx(36 * 0.6e-3 + rest)
    work = Workload(
        sequences=3,
        prompt=100.0,
        response=50.0,
        new_tokens=50,
        teacher_prompt=100.0,
        teacher_passes=0,
        initial_passes=0,
        updates=1,
        output_products=3.0,
        logit_sets=1,
    )
    # Three batches of one row: a prompt and 50 tokens each.
    prompts, decoding = times.seconds(work, prefill_tokens=4096)
    assert prompts.total == pytest.approx(3 * 36 * layer().forward(100, 50).total)
    assert decoding.total == pytest.approx(3 * 50 * times.token(1, 125).total)


def test_context_parallel_ranks_sample_on_their_own():
    """64 prompts of 200 tokens on 8 copies of the weights: each reads 8 prompts at once, with any CP."""
    model = ask(gpus=8, problems_per_step=64, prompt_tokens=200).model()
    expected = 36 * layer().forward(8 * 200, 100)
    for cp in (1, 2, 8):
        phases = model.step(Candidate(cp=cp, dp=8 // cp)).phases
        assert phases["prompts"].parts() == pytest.approx(expected.parts())
        assert phases["decoding"] == model.step(Candidate(dp=8)).phases["decoding"]


def test_experts_keep_their_ranks_while_context_parallel_ranks_sample():
    """30B-A3B, EP 8 within a node: the all-to-all of the prompts is the same with DP 8 and with CP 8."""
    model = ask("qwen3_30b_a3b", gpus=8, problems_per_step=64, prompt_tokens=200).model()
    found = [model.step(Candidate(cp=cp, dp=8 // cp, ep=8)).phases["prompts"].nvlink for cp in (1, 8)]
    assert found == [pytest.approx(48 * 2 * (1600 * 8 * 2048 * 2 * 7 / 8 / NVLINK + 10e-6))] * 2


def test_servers_hold_the_weights():
    """16.4 GB fit into 80 x 0.9 x 0.6 GB; 65.5 GB need two GPUs; 470 GB do not fit into eight of 345 GB in all."""
    sizes = {}
    for name in ("qwen3_8b", "qwen3_32b", "qwen3_235b_a22b"):
        moving = LayerTime(shape=find_model(name)[1], gpu=H100, layout=Candidate())
        sizes[name] = server_layout(moving, gpus=16)
    assert sizes["qwen3_8b"] == (Candidate(tp=1), 16)
    assert sizes["qwen3_32b"] == (Candidate(tp=2), 8)
    assert sizes["qwen3_235b_a22b"] == (Candidate(tp=8, ep=8, etp=1), 2)
    assert transfer(layer()).network == pytest.approx(2 * SHAPE.num_parameters / NETWORK)


def test_servers_that_cannot_exist():
    """235B has 470 GB of weights and 64 heads; 4 groups are copied on 8 GPUs. vLLM takes 0.9 of 80 GB: 576 GB of 8."""
    moving = LayerTime(shape=find_model("qwen3_235b_a22b")[1], gpu=H100, layout=Candidate())
    for gpus, sizes in ((1, "1"), (4, "1, 2, 4"), (6, "1, 2"), (7, "1")):  # 3, 6 and 7 divide no heads
        with pytest.raises(UserError, match=rf"^--sampling-gpus={gpus}: .* 470 GB .* server of {sizes} GPUs .* 72 GB"):
            server_layout(moving, gpus=gpus)
    assert server_layout(replace(moving, gpu=known_gpus()["h200"]), gpus=4) == (Candidate(tp=4, ep=4, etp=1), 1)
    # 3 GPUs of a node are three servers of 8B, because 3 does not divide 32 heads.
    assert server_layout(layer(), gpus=3) == (Candidate(tp=1), 3)


def test_communication_hides_behind_other_work():
    assert Seconds(nvlink=1.0, network=3.0).exposed(1.0) == Seconds(nvlink=0.75, network=2.25)
    assert Seconds(nvlink=1.0).exposed(2.0).total == 0
    assert Seconds().exposed(1.0).total == 0
