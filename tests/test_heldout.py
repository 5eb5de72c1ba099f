"""Held-out loss: every token predicted once, with the context it should have, on any number of ranks."""

import itertools
import math

import pytest
import torch

from tests.closeness import assert_close
from tests.tiny_corpus import tiny_shards, tiny_texts
from tests.tiny_model import tiny_model
from tests.tiny_run import VOCAB_SIZE
from tnl.data.shards import ShardSet
from tnl.data.tokenizer import Tokenizer
from tnl.evaluation.heldout import heldout_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """The held-out split of a tiny corpus."""
    return ShardSet.open(tiny_shards(tmp_path_factory.mktemp("data")), "heldout")


@pytest.fixture(scope="module")
def model():
    """A model with random weights, large enough that context matters."""
    return tiny_model(vocab_size=VOCAB_SIZE)


def by_document(model, shards) -> tuple[float, int]:
    """Sum of the losses of each document alone, and the number of predicted tokens."""
    bounds = [*shards.document_starts(0, shards.num_tokens).tolist(), shards.num_tokens]
    loss, count = 0.0, 0
    for start, stop in itertools.pairwise(bounds):
        ids = torch.from_numpy(shards.tokens(start, stop).astype("int64")).unsqueeze(0)
        output = model(ids, labels=ids)
        loss, count = loss + output.loss_sum.item(), count + output.num_tokens.item()
    return loss, count


@pytest.mark.parametrize("length", [7, 64, 100_000])
def test_whole_documents_in_segments_of_any_length(model, heldout, length):
    with torch.no_grad():
        loss, count = by_document(model, heldout)
    result = heldout_loss(model, heldout, device=CPU, length=length)
    assert result.num_predicted == count == heldout.num_tokens - heldout.num_documents
    assert_close("loss", torch.tensor(result.loss_sum), torch.tensor(loss))
    assert result.bits_per_token == pytest.approx(result.loss / math.log(2))
    assert result.bits_per_byte == pytest.approx(result.loss_sum / math.log(2) / heldout.num_bytes)


def test_a_window_restarts_the_context(model, heldout):
    result = heldout_loss(model, heldout, device=CPU, length=32, window=16)
    whole = heldout_loss(model, heldout, device=CPU)
    assert result.num_predicted == whole.num_predicted
    assert result.loss_sum != pytest.approx(whole.loss_sum, rel=1e-4)
    same = heldout_loss(model, heldout, device=CPU, length=160, window=16)
    assert result.loss_sum == pytest.approx(same.loss_sum, rel=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_together_read_every_window_in_equally_many_passes(model, heldout, world_size):
    expected = heldout_loss(model, heldout, device=CPU, length=32, window=16)
    passes, parts = [], []
    for rank in range(world_size):
        calls = []
        handle = model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        parts.append(heldout_loss(model, heldout, device=CPU, length=32, window=16, rank=rank, world_size=world_size))
        handle.remove()
        passes.append(len(calls))
    assert len(set(passes)) == 1
    assert sum(part.loss_sum for part in parts) == pytest.approx(expected.loss_sum, rel=1e-6)
    assert sum(part.num_predicted for part in parts) == expected.num_predicted


def test_part_of_a_split_has_no_bits_per_byte(model, heldout):
    result = heldout_loss(model, heldout, device=CPU, max_tokens=100)
    assert result.num_tokens == 100
    assert result.bits_per_byte is None


def test_training_mode_comes_back(model, heldout):
    model.train()
    heldout_loss(model, heldout, device=CPU, max_tokens=50)
    assert model.training
    model.eval()


def test_bits_per_byte_leave_out_the_bytes_that_nothing_predicts(model, tmp_path):
    shards = ShardSet.open(
        tiny_shards(tmp_path, texts=[*tiny_texts(), "\u00e9t\u00e9", *"abcdefgh"], add_bos=False), "heldout"
    )
    tokenizer = Tokenizer.load(shards.folder / "tokenizer.model")
    bounds = [*shards.document_starts(0, shards.num_tokens).tolist(), shards.num_tokens]
    predicted = 0
    for start, stop in itertools.pairwise(bounds):
        ids = shards.tokens(start, stop).tolist()
        whole = len(tokenizer.decode(ids).encode())
        assert sum(map(tokenizer.num_bytes, ids)) == whole
        predicted += whole - tokenizer.num_bytes(ids[0])
    result = heldout_loss(model, shards, device=CPU)
    assert result.num_bytes == predicted < shards.num_bytes
