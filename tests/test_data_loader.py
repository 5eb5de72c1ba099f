"""The loader: order is a function of integers, every window once per epoch, nothing predicted across a boundary."""

import itertools
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from tests.tiny_corpus import tiny_shards
from tnl.data.loader import TrainLoader, Windows
from tnl.data.permutation import permute
from tnl.data.shards import ShardSet
from tnl.errors import ConfigError, DataError
from tnl.model.loss import IGNORE_INDEX


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return ShardSet.open(tiny_shards(tmp_path_factory.mktemp("corpus")))


def rows(steps, seq_len):
    """Token windows of micro-batches of one rank, step by step: list of [windows, seq_len] arrays."""
    return [torch.cat([micro["input_ids"].reshape(-1, seq_len) for micro in step]).numpy() for step in steps]


def ids_of(steps):
    return [[i for micro in step for i in micro["sample_ids"].tolist()] for step in steps]


def equal(a, b):
    return all(
        (x[key] is None and y[key] is None) or (x[key].dtype == y[key].dtype and torch.equal(x[key], y[key]))
        for step_a, step_b in zip(a, b, strict=True)
        for x, y in zip(step_a, step_b, strict=True)
        for key in ("input_ids", "labels", "cu_seqlens", "sample_ids")
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000])
def test_the_permutation_is_one_and_depends_on_its_key(size):
    images = [[permute(i, size, key) for i in range(size)] for key in (b"a", b"b")]
    assert sorted(images[0]) == sorted(images[1]) == list(range(size))
    assert size < 16 or images[0] != images[1] != list(range(size))


def test_the_permutation_spreads_neighbours():
    image = np.array([permute(i, 10_000, b"key") for i in range(2000)])
    assert abs(np.corrcoef(np.arange(2000), image)[0, 1]) < 0.1
    assert abs(image.mean() / 5000 - 1) < 0.05
    assert permute(3, 2**40, b"key") < 2**40


@pytest.mark.parametrize("seq_len", [2, 16, 33, 500])
def test_an_epoch_holds_every_window_once_and_predicts_no_token_twice(shards, seq_len):
    windows = Windows(shards, seq_len, seed=0)
    assert windows.num_windows == (shards.num_tokens - 1) // (seq_len - 1)
    stream = np.tile(shards.tokens(0, shards.num_tokens), 2)
    orders = []
    for epoch in range(2):
        starts = [windows.start(epoch * windows.num_windows + i) for i in range(windows.num_windows)]
        predicted = (np.array(starts)[:, None] + np.arange(1, seq_len)) % shards.num_tokens
        assert len(np.unique(predicted)) == predicted.size
        assert shards.num_tokens - predicted.size < seq_len
        orders.append(starts)
    assert orders[0] != orders[1]
    assert seq_len == 2 or set(orders[0]) != set(orders[1])
    wrapped = next(i for i in range(windows.num_windows) if windows.start(i) + seq_len > shards.num_tokens - seq_len)
    for sample in (*range(min(20, windows.num_windows)), wrapped):
        start = windows.start(sample)
        np.testing.assert_array_equal(windows.tokens(sample), stream[start : start + seq_len])


def test_ranks_and_micro_batches_do_not_change_what_a_step_sees(shards):
    reference = list(TrainLoader(shards, 32, 8, 8).steps(0, 30))
    expected = rows(reference, 32)
    assert TrainLoader(shards, 32, 8, 8).num_windows < 30 * 8
    for world_size, micro_batch in itertools.product([1, 2, 4], [1, 2, 4]):
        if 8 % (world_size * micro_batch):
            continue
        loaders = [TrainLoader(shards, 32, 8, micro_batch, rank=r, world_size=world_size) for r in range(world_size)]
        assert {loader.micro_batches_per_step for loader in loaders} == {8 // world_size // micro_batch}
        parts = [rows(loader.steps(0, 30), 32) for loader in loaders]
        for step in range(30):
            np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), expected[step])
        ids = [ids_of(loader.steps(0, 30)) for loader in loaders]
        assert [list(itertools.chain(*(part[step] for part in ids))) for step in range(30)] == ids_of(reference)


def test_resuming_at_any_step_gives_the_same_sequence(shards):
    loader = TrainLoader(shards, 32, 4, 2, seed=3)
    whole = list(loader.steps(0, 100))
    assert ids_of(whole) == [list(range(4 * s, 4 * s + 4)) for s in range(100)]
    assert loader.num_windows < 400
    for k in range(1, 101):
        fresh = TrainLoader(shards, 32, 4, 2, seed=3)
        assert equal(list(fresh.steps(k, min(100, k + 5))), whole[k : k + 5])


def test_seed_and_data_change_the_order_and_global_generators_do_not(shards, tmp_path):
    first = rows(TrainLoader(shards, 32, 4, 2, seed=0).steps(0, 3), 32)
    torch.manual_seed(5)
    np.random.seed(5)
    state = torch.get_rng_state()
    again = rows(TrainLoader(shards, 32, 4, 2, seed=0).steps(0, 3), 32)
    assert torch.equal(torch.get_rng_state(), state)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    other_seed = TrainLoader(shards, 32, 4, 2, seed=1)
    assert any((a != b).any() for a, b in zip(first, rows(other_seed.steps(0, 3), 32), strict=True))
    other = ShardSet.open(tiny_shards(tmp_path, seed=9))
    assert TrainLoader(other, 32, 4, 2).fingerprint != other_seed.fingerprint


@pytest.mark.parametrize("packing", [True, False])
def test_workers_do_not_change_the_batches(shards, packing):
    alone = list(TrainLoader(shards, 32, 4, 2, packing=packing).steps(5, 11))
    state = torch.get_rng_state()
    helped = list(TrainLoader(shards, 32, 4, 2, packing=packing, num_workers=2).steps(5, 11))
    assert equal(alone, helped)
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_leave_signals_to_the_loop(shards):
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    steps = TrainLoader(shards, 32, 4, 2, num_workers=1).steps(0, 50)
    next(steps)
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, signal.SIGTERM)
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(steps)) == 49
    assert {signum: signal.getsignal(signum) for signum in before} == before


def test_packing_restarts_at_windows_and_documents_and_predicts_across_none(shards):
    seq_len, micro_batch = 64, 3
    loader = TrainLoader(shards, seq_len, 3, micro_batch)
    seen = 0
    for (micro,) in loader.steps(0, 2 * loader.num_windows // 3):
        ids, labels, bounds = micro["input_ids"], micro["labels"], micro["cu_seqlens"]
        assert (ids.shape, ids.dtype, labels.dtype, bounds.dtype) == (
            (1, micro_batch * seq_len),
            torch.int64,
            torch.int64,
            torch.int32,
        )
        # bos stands at the start of each document and nowhere else.
        expected = sorted({*range(0, ids.numel() + 1, seq_len), *(ids[0] == 1).nonzero().flatten().tolist()})
        assert bounds.tolist() == expected
        first = torch.zeros(ids.numel(), dtype=torch.bool)
        first[bounds[:-1].long()] = True
        assert (labels[0][first] == IGNORE_INDEX).all()
        assert torch.equal(labels[0][~first], ids[0][~first])
        seen += len(expected) - 1 - micro_batch
    assert seen > 50


def test_without_packing_a_window_is_one_text(shards):
    ((first, second),) = TrainLoader(shards, 64, 4, 2, packing=False).steps(7, 8)
    assert first["input_ids"].shape == (2, 64)
    assert first["cu_seqlens"] is None
    assert torch.equal(first["labels"], first["input_ids"])
    assert first["labels"].data_ptr() != first["input_ids"].data_ptr()
    assert second["sample_ids"].tolist() == [30, 31]


def test_windows_consumed_are_those_of_all_ranks(shards):
    loaders = [TrainLoader(shards, 32, 4, 1, rank=r, world_size=2) for r in range(2)]
    consumed, starts = zip(*loaders[0].windows_consumed(3, 9), strict=True)
    assert len(consumed) == 24
    assert all(
        (window[own] == 1).all() and (window == 1).sum() == len(own)
        for window, own in zip(consumed, starts, strict=True)
    )
    parts = [rows(loader.steps(3, 9), 32) for loader in loaders]
    expected = np.concatenate([part[step] for step in range(6) for part in parts])
    np.testing.assert_array_equal(np.stack(consumed), expected)


def test_an_empty_range_gives_no_step(shards):
    assert list(TrainLoader(shards, 32, 4, 2).steps(5, 5)) == []


def test_data_that_do_not_fill_a_window_are_refused(shards):
    with pytest.raises(ConfigError, match=r"train\.sequence_length: 1 predicts no token"):
        TrainLoader(shards, 1, 2, 1)
    size = shards.num_tokens
    with pytest.raises(
        DataError, match=rf"{size} tokens in split train do not fill one window of train\.sequence_length {size + 1}"
    ):
        TrainLoader(shards, size + 1, 2, 1)
    assert TrainLoader(shards, size, 2, 1).num_windows == 1


def test_large_sample_numbers_stay_exact(shards):
    loader = TrainLoader(shards, 32, 4, 2)
    ((first, second),) = loader.steps(2**40, 2**40 + 1)
    assert first["sample_ids"].tolist() + second["sample_ids"].tolist() == [2**42 + i for i in range(4)]
