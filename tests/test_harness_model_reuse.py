"""What requests share is read once: how many tokens that saves beside the ``hf`` adapter, and in how much memory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM

from tests.harness_requests import assert_same_scores, multiple_choice
from tests.tiny_model import random_ids, tiny_model
from tests.tiny_tokenizers import released_tokenizer
from tests.tiny_tokenizers import tiny_model as tiny_sentencepiece
from tnl.evaluation.harness_model import HarnessModel
from tnl.evaluation.prefix_reader import ForkedState, PrefixReader
from tnl.evaluation.prefix_tree import FORK_TOKENS, common_length, new_tokens, plan_reads, sort_key
from tnl.evaluation.rank_division import RankDivision
from tnl.model.state import TransnormerState, state_bytes


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=400)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    return AutoTokenizer.from_pretrained(released_tokenizer(folder / "t", tiny_sentencepiece()))


@pytest.fixture
def tokens_computed(model):
    """Tokens of every forward pass, padding included: a batch of the ``hf`` adapter has no mask."""
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, named: seen.append((args[0] if args else named["input_ids"]).numel()), with_kwargs=True
    )
    yield seen
    handle.remove()


def tokens_against_hf(model, tokenizer, asked, tokens_computed) -> float:
    """How many times as many tokens the ``hf`` adapter computes for the same answers."""
    expected = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=8).loglikelihood(asked, True)
    theirs = sum(tokens_computed)
    del tokens_computed[:]
    ours = HarnessModel(model, tokenizer)
    scores = ours.loglikelihood(asked, disable_tqdm=True)
    assert_same_scores(scores, expected)
    assert ours.counts.tokens_read == sum(tokens_computed)
    return theirs / sum(tokens_computed)


def test_mmlu_shaped_work_takes_a_sixth_of_the_tokens_of_hf(model, tokenizer, tokens_computed):
    # A tenth of the lengths. The choices are one token, for which the hf adapter reads a question once, too.
    asked = multiple_choice(3, 25, 70, 10, ("A", "B", "C", "D"))
    assert tokens_against_hf(model, tokenizer, asked, tokens_computed) > 5.5


def test_hellaswag_shaped_work_takes_half_of_the_tokens_of_hf(model, tokenizer, tokens_computed):
    endings = [" self value in range" * 5, " return the state of" * 5, " = 12 + 345" * 5, " print decay for a" * 5]
    asked = multiple_choice(1, 12, 0, 80, tuple(endings))
    assert tokens_against_hf(model, tokenizer, asked, tokens_computed) > 1.9


# The plan


SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=60), min_size=1, max_size=12)


def sorted_arrays(sequences):
    arrays = {sort_key(array): array for array in (np.array(ids) for ids in sequences)}
    return [array for _, array in sorted(arrays.items())]


def all_reads(tops):
    for read in tops:
        yield read
        yield from all_reads(read.children)


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, st.lists(st.integers(0, 2), max_size=60), st.integers(0, 3))
def test_every_sequence_is_a_path_from_the_top(sequences, prefix, max_levels):
    arrays = sorted_arrays([prefix + ids for ids in sequences])
    tops, levels = plan_reads(arrays, max_levels)
    assert levels <= max_levels
    reads = list(all_reads(tops))
    assert sorted(i for read in reads for i in read.sequences) == list(range(len(arrays)))
    for read in reads:
        assert not read.children or len(read.children) > 1
        for i in read.sequences:
            parts = [part.ids[a - part.start : b - part.start] for part, a, b in read.parts(0, len(arrays[i]))]
            assert np.concatenate(parts[::-1]).tolist() == arrays[i].tolist()
    forks = sum(len(read.children) + 1 for read in reads if read.children)
    total = sum(len(read.ids) for read in reads)
    assert total + FORK_TOKENS * forks <= sum(map(len, arrays))
    assert total >= new_tokens(arrays).sum()


def test_a_beginning_of_a_few_tokens_is_read_again():
    arrays = sorted_arrays([[1, 2, i, *range(20)] for i in range(50)])
    tops, levels = plan_reads(arrays)
    assert (len(tops), levels) == (50, 0)


def test_questions_behind_shots_and_choices_behind_questions_are_two_levels():
    shots, questions = list(range(100, 160)), [[i] * 40 for i in range(10)]
    arrays = sorted_arrays([shots + question + [50 + i, 7, 8] for question in questions for i in range(4)])
    tops, levels = plan_reads(arrays)
    assert levels == 2
    assert sum(len(read.ids) for read in all_reads(tops)) == 60 + 10 * 40 + 40 * 3


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_the_common_beginning_is_found(a, b):
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_length(np.array(a), np.array(b)) == expected


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 8))
def test_the_ranks_share_everything_evenly(costs, size):
    division, shares = RankDivision(), []
    division.size = size
    for division.rank in range(size):
        shares.append(costs[division.share(lambda: costs)])
    assert [cost for share in shares for cost in share] == costs
    assert max(map(sum, shares)) <= sum(costs) / size + max(costs, default=0)


# The states


def test_a_forked_state_continues_like_a_copy_and_leaves_its_source(model):
    ids, more = random_ids(1, 30), random_ids(1, 3, seed=1)
    state, sources = TransnormerState(), torch.tensor([1, 0, 1])
    cu_seqlens = torch.tensor([0, 12, 30], dtype=torch.int32)
    with torch.no_grad():
        model(ids, cu_seqlens=cu_seqlens, past_key_values=state)
        before, singles = state.fork(), torch.arange(4, dtype=torch.int32)
        expected = model(more, cu_seqlens=singles, past_key_values=state.continued(sources)).logits
        forked = ForkedState(state, sources)
        assert torch.equal(model(more, cu_seqlens=singles, past_key_values=forked, use_cache=False).logits, expected)
        assert torch.equal(model(more, cu_seqlens=singles, past_key_values=forked).logits, expected)
        again = model(more, cu_seqlens=singles, past_key_values=state.continued(sources), use_cache=True)
        further = model(more, cu_seqlens=singles, past_key_values=again.past_key_values).logits
        assert torch.equal(model(more, cu_seqlens=singles, past_key_values=forked).logits, further)
    for layer, kept in zip(state.layers, before.layers, strict=True):
        assert torch.equal(layer, kept)


@pytest.mark.parametrize("num_states", [2, 6])
def test_held_states_stay_within_their_bytes(model, num_states, monkeypatch):
    held, most = 0, 0
    update = TransnormerState.update

    def counted(self, layers, positions, num_columns):
        nonlocal held, most
        update(self, layers, positions, num_columns)
        rows = len(positions)
        held, most = held + rows, max(most, held + rows)

        class Release:
            def __del__(self):
                nonlocal held
                held -= rows

        self.release = Release()

    monkeypatch.setattr(TransnormerState, "update", counted)
    shots = [[5] * 40 + [i] * 3 for i in range(3)]
    arrays = sorted_arrays(
        [s + [i] * 40 + [50 + j, 7, 8] for s in shots for i in range(5) for j in range(4)]  # two levels
    )
    reader = PrefixReader(model, 2**14, num_states * state_bytes(model.config))
    reader.run(arrays)
    assert reader.tokens_read == sum(len(read.ids) for read in all_reads(plan_reads(arrays)[0]))
    assert 1 < most <= num_states
