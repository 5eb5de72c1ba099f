"""Packed, grouped and padded examples: each once an epoch, the same whatever the ranks, and equal to them alone."""

from itertools import chain

import numpy as np
import pytest
import torch

from tests.closeness import assert_close
from tests.tiny_model import VOCAB, tiny_model
from tnl.data.examples import ExampleCounts, ExampleSet
from tnl.data.instruction_loader import InstructionLoader, heldout_batches
from tnl.data.loader import num_labelled
from tnl.data.packing import EpochPlan
from tnl.errors import ConfigError

BATCHINGS = ("packed", "grouped", "padded")
LENGTH = 64


def examples(num=150, longest=60, seed=0):
    """Examples whose first two tokens tell their number; about half of the tokens behind them are trained."""
    draw = np.random.RandomState(seed)
    pairs = []
    for i in range(num):
        ids = draw.randint(3, VOCAB, draw.randint(4, longest + 1)).astype(np.int32)
        ids[:2] = 3 + i // (VOCAB - 3), 3 + i % (VOCAB - 3)
        trained = draw.rand(len(ids)) < 0.5
        trained[0], trained[-1] = False, True
        pairs.append((ids, trained))
    return ExampleSet(pairs, ExampleCounts())


def loader(data, global_batch=4, micro_batch=1, **changes):
    return InstructionLoader(data, LENGTH, global_batch, micro_batch, **({"pad_id": 0} | changes))


def segments(micro_batch):
    """``(ids, labels)`` of each sequence of a micro-batch, what fills up left out."""
    ids, labels, cu_seqlens = (micro_batch[name] for name in ("input_ids", "labels", "cu_seqlens"))
    if cu_seqlens is None:
        found = list(zip(ids, labels, strict=True))
    else:
        sizes = cu_seqlens.diff().tolist()
        found = list(zip(ids[0].split(sizes), labels[0].split(sizes), strict=True))
    return [(own[own > 0].tolist(), label[own > 0].tolist()) for own, label in found if (own > 0).any()]


def expected(data):
    return sorted(
        (ids.tolist(), [-100, *np.where(trained, ids, -100)[1:].tolist()])
        for ids, trained in map(data.__getitem__, range(len(data)))
    )


@pytest.mark.parametrize("batching", BATCHINGS)
def test_every_example_comes_once_an_epoch_whole_and_with_its_mask(batching):
    data = examples()
    found = loader(data, global_batch=1, batching=batching)
    num_groups = found.statistics().sequences
    assert found.steps_per_epoch == num_groups
    epochs = []
    for first in (0, num_groups):
        batches = [batch for step in found.steps(first, first + num_groups) for batch in step]
        if first and found.statistics(1).sequences != num_groups:
            break
        assert sorted(pair for batch in batches for pair in segments(batch)) == expected(data)
        epochs.append([segments(batch) for batch in batches])
    assert epochs[0] != epochs[-1] or len(epochs) == 1


def test_a_packed_micro_batch_has_a_fixed_shape_and_no_label_across_a_border():
    for (batch,) in loader(examples(), global_batch=2, micro_batch=2).steps(0, 6):
        assert batch["input_ids"].shape == batch["labels"].shape == (1, 2 * LENGTH)
        cu_seqlens = batch["cu_seqlens"]
        assert cu_seqlens.dtype == torch.int32
        assert {0, LENGTH, 2 * LENGTH} <= set(cu_seqlens.tolist())
        assert (cu_seqlens.diff() > 0).all()
        assert (batch["labels"][0, cu_seqlens[:-1].long()] == -100).all()
        assert (batch["labels"][batch["input_ids"] == 0] == -100).all()


@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_step_is_the_same_for_any_ranks_workers_and_restarts(batching):
    data = examples()

    def steps(first, last, **changes):
        found = loader(data, batching=batching, seed=5, **changes)
        return [[segments(batch) for batch in step] for step in found.steps(first, last)]

    whole = steps(0, 40)  # more than one epoch
    assert steps(0, 40) == whole
    assert steps(31, 40) == whole[31:]
    assert steps(3, 6, num_workers=2) == whole[3:6]
    ranks = [steps(0, 40, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    other = [[segments(batch) for batch in step] for step in loader(data, batching=batching, seed=6).steps(0, 40)]
    assert other != whole
    if batching == "packed":
        larger = steps(0, 40, micro_batch=2)
        assert [list(chain(*step)) for step in larger] == [list(chain(*step)) for step in whole]


def test_packing_wastes_little_where_examples_are_short():
    lengths = np.clip(np.random.RandomState(0).lognormal(4.3, 0.7, 20_000).astype(np.int64), 10, 2048)

    def waste(batching, capacity):
        groups = EpochPlan(lengths, capacity, batching, "key").groups
        assert sorted(np.concatenate(groups)) == list(range(len(lengths)))
        if batching == "packed":
            assert max(lengths[group].sum() for group in groups) <= capacity
            return 1 - lengths.sum() / (len(groups) * capacity)
        assert max(len(group) * lengths[group].max() for group in groups) <= capacity
        return 1 - lengths.sum() / sum(len(group) * lengths[group].max() for group in groups)

    assert waste("packed", 2048) < 0.005
    assert waste("grouped", 2048) < 0.05
    assert waste("padded", 2048) > 0.4


@pytest.mark.parametrize("batching", BATCHINGS)
def test_loss_and_gradients_of_a_batch_are_those_of_its_examples_one_by_one(batching):
    model, data = tiny_model().train(), examples(longest=30)
    ((batch,),) = loader(data, global_batch=1, batching=batching).steps(2, 3)
    inputs = {name: batch[name] for name in ("input_ids", "labels", "cu_seqlens")}
    together = model(**inputs)
    together.loss_sum.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    own = segments(batch)
    assert len(own) > 1
    alone = [model(torch.tensor([ids]), labels=torch.tensor([labels])) for ids, labels in own]
    losses = torch.stack([output.loss_sum for output in alone])
    losses.sum().backward()
    assert_close("loss", together.loss_sum, losses.sum(), 1e-5)
    assert together.num_tokens == sum(output.num_tokens for output in alone) == num_labelled(batch)
    for name, p in model.named_parameters():
        assert_close(name, gradients[name], p.grad, 1e-5)
    if batching == "packed":
        sizes = batch["cu_seqlens"].diff().tolist()
        logits = model(**inputs | {"labels": None}).logits[0].split(sizes)
        for part, (ids, labels), loss in zip(logits, own, losses, strict=False):
            found = torch.nn.functional.cross_entropy(part[: len(ids) - 1], torch.tensor(labels[1:]), reduction="sum")
            assert_close("loss of one example", found, loss, 1e-5)


def test_padded_batches_take_one_group_a_pass():
    with pytest.raises(ConfigError, match=r"data\.batching: grouped takes one batch .*micro_batch_size: 1"):
        loader(examples(), micro_batch=2, batching="grouped")


def test_heldout_shares_are_equally_many_and_hold_every_example_once():
    data = examples(40)
    shares = [list(heldout_batches(data, LENGTH, pad_id=0, rank=rank, world_size=3)) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(pair for share in shares for batch in share for pair in segments(batch)) == expected(data)
    few = [pair for batch in heldout_batches(data, LENGTH, pad_id=0, max_tokens=100) for pair in segments(batch)]
    assert 60 < sum(len(ids) for ids, _ in few) <= 100
    alone = examples(1)
    empty = list(heldout_batches(alone, LENGTH, pad_id=0, rank=1, world_size=2))
    assert [num_labelled(batch) for batch in empty] == [0]
    output = tiny_model()(**{name: empty[0][name] for name in ("input_ids", "labels", "cu_seqlens")})
    assert output.loss_sum == 0
