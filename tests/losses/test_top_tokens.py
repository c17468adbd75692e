"""The likeliest tokens over a complete and a sharded vocabulary, against a dense softmax in float64 numpy."""

import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_paint.losses import ShardedVocab, WholeVocab
from megatron_paint.losses.top_tokens import top_tokens

TOKENS, HIDDEN, COLUMNS, VALID = 7, 5, 12, 10
# Columns of each rank. With 3 ranks the last one holds padding alone, and the second one fewer entries than are asked.
CUTS = {2: (0, 6, 12), 3: (0, 7, 10, 12)}


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(size, HIDDEN, generator=generator, dtype=torch.float64) for size in (TOKENS, COLUMNS)]
    return [tensor.to(dtype) for tensor in made]


def dense(count):
    """Ids and probabilities of the largest entries, from a softmax over the real entries."""
    hidden, weight = (tensor.numpy() for tensor in data())
    logits = hidden @ weight[:VALID].T
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    ids = np.argsort(-shares, axis=1)[:, :count]
    return ids, np.take_along_axis(shares, ids, axis=1)


@pytest.mark.parametrize("count", [1, 5, VALID, 50])
@pytest.mark.parametrize("chunk_bytes", [1e9, 400.0])
def test_whole_vocabulary_equals_dense(count, chunk_bytes):
    hidden, weight = data()
    found = top_tokens(hidden, weight, vocab=WholeVocab(valid_size=VALID), count=count, chunk_bytes=chunk_bytes)
    ids, shares = dense(min(count, VALID))
    assert found.ids_TK.tolist() == ids.tolist()
    assert np.abs(found.probability_TK.numpy() - shares).max() < 1e-14


def test_float32_and_bfloat16():
    hidden, weight = data(torch.float32)
    found = top_tokens(hidden, weight, vocab=WholeVocab(valid_size=VALID), count=5)
    ids, shares = dense(5)
    assert found.probability_TK.dtype == torch.float32
    assert found.ids_TK.tolist() == ids.tolist()
    assert np.abs(found.probability_TK.numpy() - shares).max() < 1e-6
    half = [tensor.bfloat16() for tensor in (hidden, weight)]
    assert top_tokens(*half, vocab=WholeVocab(), count=2).probability_TK.dtype == torch.float32


def test_no_gradient_is_kept():
    hidden, weight = (tensor.requires_grad_() for tensor in data())
    assert not top_tokens(hidden, weight, vocab=WholeVocab(), count=2).probability_TK.requires_grad


def test_no_rows():
    _, weight = data()
    found = top_tokens(weight[:0], weight, vocab=WholeVocab(), count=3)
    assert (found.ids_TK.shape, found.probability_TK.shape) == ((0, 3), (0, 3))


def test_refusals():
    hidden, weight = data()
    with pytest.raises(ValueError, match="count: got 0"):
        top_tokens(hidden, weight, vocab=WholeVocab(), count=0)
    with pytest.raises(ValueError, match="hidden_TH"):
        top_tokens(hidden[:, :2], weight, vocab=WholeVocab(), count=1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_vocabulary_equals_dense(ranks, tmp_path):
    """Every rank has the dense result, ids to the bit."""
    mp.get_context("forkserver").set_forkserver_preload([__name__])
    mp.start_processes(_rank, (ranks, str(tmp_path)), nprocs=ranks, start_method="forkserver")
    for rank in range(ranks):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for count in ("1", "5", "50"):
            ids, shares = dense(min(int(count), VALID))
            assert found[count]["ids"] == ids.tolist()
            assert np.abs(np.array(found[count]["shares"]) - shares).max() < 1e-14


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=timedelta(seconds=300)
    )
    start, stop = CUTS[ranks][rank], CUTS[ranks][rank + 1]
    vocab = ShardedVocab(dist.group.WORLD, start=start, stop=stop, size=COLUMNS, valid_size=VALID)
    hidden, weight = data()
    result = {}
    for count in (1, 5, 50):
        found = top_tokens(hidden, weight[start:stop], vocab=vocab, count=count, chunk_bytes=600.0)
        result[count] = {"ids": found.ids_TK.tolist(), "shares": found.probability_TK.tolist()}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
