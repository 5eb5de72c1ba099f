"""The n-gram baselines against the definition written with dictionaries, and the promises of their docstrings."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from tnl.errors import ConfigError, DataError
from tnl.evaluation.ngram import NgramModel, evaluate_ngrams

VOCAB = 13


def markov_text(length: int, seed: int, vocab: int = VOCAB) -> np.ndarray:
    """Text whose next token depends on the two before it."""
    rng = np.random.default_rng(seed)
    tokens = [0, 1]
    while len(tokens) < length:
        favourite = (3 * tokens[-1] + 5 * tokens[-2] + 1) % vocab
        tokens.append(favourite if rng.random() < 0.6 else int(vocab * rng.random() ** 2))
    return np.array(tokens)


class SlowKneserNey:
    """The definition, one n-gram at a time."""

    def __init__(self, segments: list[tuple[bool, list[int]]], vocab: int, order: int):
        """``segments``: whether it begins a document, and its tokens."""
        self.vocab, self.order = vocab, order
        raw = {k: Counter() for k in range(1, order + 1)}
        for _, segment in segments:
            for k in raw:
                raw[k].update(tuple(segment[i : i + k]) for i in range(len(segment) - k + 1))
        self.counts = {order: raw[order]}
        for k in range(1, order):
            left = defaultdict(set)
            for gram in raw[k + 1]:
                left[gram[1:]].add(gram[0])
            self.counts[k] = Counter({gram: len(tokens) for gram, tokens in left.items()})
            self.counts[k].update(tuple(s[:k]) for begins, s in segments if begins and len(s) >= k > 1)
        self.discounts = {k: self.discount(self.counts[k].values()) for k in self.counts}

    @staticmethod
    def discount(counts) -> dict[int, float]:
        n1, n2, n3, n4 = (sum(count == i for count in counts) for i in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
        if n1 and n2 and n3 and n4:
            modified = {1: 1 - 2 * y * n2 / n1, 2: 2 - 3 * y * n3 / n2, 3: 3 - 4 * y * n4 / n3}
            if all(0 < modified[i] < i for i in modified):
                return modified
        return {1: y, 2: y, 3: y}

    def probability(self, history: tuple[int, ...], token: int) -> float:
        history = history[max(0, len(history) - self.order + 1) :]
        lower = self.probability(history[1:], token) if history else 1 / self.vocab
        k = len(history) + 1
        followers = {gram: count for gram, count in self.counts[k].items() if gram[:-1] == history}
        if not followers:
            return lower
        total = sum(followers.values())
        discount = {gram: self.discounts[k][min(count, 3)] for gram, count in followers.items()}
        gram = (*history, token)
        own = (followers[gram] - discount[gram]) / total if gram in followers else 0.0
        return own + sum(discount.values()) / total * lower


def next_distribution(model: NgramModel, history: list[int]) -> np.ndarray:
    """Probabilities of every token after ``history``, from one call that scores ``vocab_size`` documents."""
    documents = np.array([[*history, token] for token in range(model.vocab_size)])
    starts = np.arange(0, documents.size, documents.shape[1])
    return np.exp(model.log_prob(documents.ravel(), starts).reshape(model.vocab_size, -1)[:, -1])


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [30, 900])  # few counts: the plain discount; many: the modified one
def test_agrees_with_the_definition(order, size):
    text = markov_text(size, seed=order)
    bounds = [0, 7, 9, 12, 14, size // 2, size // 2 + 5, size]
    begins = [True, False, True, True, True, False, True]
    pairs = list(zip(begins, itertools.pairwise(bounds), strict=True))
    slow = SlowKneserNey([(is_start, text[a:b].tolist()) for is_start, (a, b) in pairs], VOCAB, order)
    windows = [(text[a:b], np.arange(int(is_start))) for is_start, (a, b) in pairs]
    heldout = np.random.default_rng(1).integers(0, VOCAB, 60)
    starts = [0, 1, 5, 30]
    expected = []
    for begin, end in zip(starts, [*starts[1:], 60], strict=True):
        document = tuple(heldout[begin:end].tolist())
        expected += [math.log(slow.probability(document[:i], document[i])) for i in range(1, len(document))]
    actual = NgramModel.count(windows, VOCAB, order).log_prob(heldout, np.array(starts))
    assert actual.shape == (60 - len(starts),)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one(order):
    vocab = 101
    text = markov_text(4000, seed=2, vocab=vocab)
    text = text[text != 100]  # one token that is never seen
    model = NgramModel.count([text], vocab, order)
    rng = np.random.default_rng(3)
    seen = [text[i : i + order].tolist() for i in rng.integers(0, text.size - order, 5)]
    unseen = [*rng.integers(0, vocab, (5, 4)).tolist(), [100], [100, 100, 100]]
    for history in [*seen, *unseen, [7]]:
        distribution = next_distribution(model, history)
        assert distribution.sum() == pytest.approx(1, abs=1e-9)
        assert distribution.min() > 0


def test_more_history_beats_less_and_uniform():
    losses = evaluate_ngrams(
        lambda: iter([markov_text(20000, seed=4)]), markov_text(5000, seed=5), np.array([0, 2500]), VOCAB, (1, 2, 3)
    )
    assert list(losses) == [1, 2, 3]
    assert losses[3] < losses[2] - 0.1 < losses[1] < math.log(VOCAB)


def test_lower_order_shares_the_counts():
    windows, heldout = [markov_text(500, seed=6)], markov_text(100, seed=7)
    shared = NgramModel.count(windows, VOCAB, 3).at_order(2)
    alone = NgramModel.count(windows, VOCAB, 2)
    np.testing.assert_array_equal(shared.log_prob(heldout, np.array([0])), alone.log_prob(heldout, np.array([0])))
    with pytest.raises(ConfigError, match="from 1 to 2"):
        alone.at_order(3)


def test_ngrams_never_cross_a_boundary():
    text = markov_text(60, seed=8)
    cuts = np.array([20, 21, 40])
    mask = np.zeros(60, bool)
    mask[cuts] = True
    heldout = markov_text(200, seed=9)

    def scores(*windows):
        return NgramModel.count(windows, VOCAB, 3).log_prob(heldout, np.array([0]))

    first, *documents = np.split(text, cuts)
    separate = scores(first, *((document, np.array([0])) for document in documents))
    np.testing.assert_array_equal(separate, scores((text, cuts)))
    np.testing.assert_array_equal(separate, scores((text, mask)))
    np.testing.assert_array_equal(scores(*text.reshape(6, 10)), scores(text.reshape(6, 10)))
    np.testing.assert_array_equal(separate, scores((text.reshape(3, 20), np.array([20, 21, 40]))))
    assert not np.array_equal(separate, scores(text))


def test_history_ends_at_the_document_start():
    model = NgramModel.count([markov_text(800, seed=10)], VOCAB, 3)
    a, b = markov_text(30, seed=11), markov_text(20, seed=12)
    together = model.log_prob(np.concatenate([a, b]), np.array([0, 30]))
    apart = np.concatenate([model.log_prob(a, np.array([0])), model.log_prob(b, np.array([0]))])
    np.testing.assert_array_equal(together, apart)


def test_the_start_of_a_document_is_known_to_every_order():
    """Nothing precedes ``1``, but that each document begins ``1 5`` is as certain for a trigram as for a bigram."""
    rng = np.random.default_rng(13)
    documents = [np.array([1, 5, *rng.integers(6, VOCAB, 10)]) for _ in range(200)]
    stream, starts = np.concatenate(documents), 12 * np.arange(200)
    model = NgramModel.count([(stream, starts)], VOCAB, 4)
    for order in (2, 3, 4):
        distribution = next_distribution(model.at_order(order), [1])
        assert distribution[5] > 0.99, order
        assert distribution.sum() == pytest.approx(1, abs=1e-9)
    # A window that begins amid a document does not make its first token that of a document.
    cut = NgramModel.count([stream], VOCAB, 3)
    assert not cut._openings[1].keys.size


def test_order_must_fit_the_key():
    window = [np.arange(64) % 2]
    assert NgramModel.count(window, 2, 64).order == 64
    assert NgramModel.count(window, 4096, 5).order == 5
    with pytest.raises(ConfigError, match="from 1 to 5"):
        NgramModel.count(window, 4096, 6)
    with pytest.raises(ConfigError, match="from 1 to 4"):
        NgramModel.count(window, 4097, 5)
    with pytest.raises(ConfigError, match="from 1 to"):
        NgramModel.count(window, 4096, 0)
    with pytest.raises(ConfigError, match="at least 2"):
        NgramModel.count(window, 1, 2)
    with pytest.raises(ConfigError, match="no n-gram orders"):
        evaluate_ngrams(lambda: window, np.arange(2), np.array([0]), 2, ())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.uint64])
def test_ids_of_any_integer_type_at_the_edge_of_the_key(dtype):
    """The largest ids fill all 64 bits; equal n-grams get equal keys whatever the type of the input."""
    text = np.tile([255, 254, 255, 253, 0], 20)
    model = NgramModel.count([text.astype(dtype)], 256, 8)
    assert model.log_prob(text.astype(dtype), np.array([0]))[10:].mean() > -0.2


def test_bad_data_is_refused():
    good = np.arange(10)
    for windows, message in [
        ([], "no 3-gram"),
        ([np.empty(0, np.int64)], "no 3-gram"),
        ([good[:2], good[:2]], "no 3-gram"),
        ([(good, np.arange(0, 10, 2))], "no 3-gram"),
        ([np.array([0, 1, VOCAB])], "lie in"),
        ([np.array([0, 1, -1])], "lie in"),
        ([np.array([0.0, 1.0])], "integer token ids"),
        (good, "integer token ids"),
        ([good.reshape(1, 2, 5)], "integer token ids"),
        ([(good, np.array([10]))], "document starts from 10"),
        ([(good, np.ones(9, bool))], "boolean mask"),
        ([(good, np.array([0.0]))], "boolean mask"),
    ]:
        with pytest.raises(DataError, match=message):
            NgramModel.count(windows, VOCAB, 3)
    model = NgramModel.count([good], VOCAB, 2)
    for tokens, starts, message in [
        (np.empty(0, np.int64), np.empty(0, np.int64), "no token to score"),
        (good, good, "no token to score"),
        (np.array([0, VOCAB]), np.array([0]), "lie in"),
        (good.reshape(2, 5), np.array([0]), "integer token ids"),
    ]:
        with pytest.raises(DataError, match=message):
            model.log_prob(tokens, starts)
