"""Interpolated Kneser-Ney n-gram language models over token ids: the baselines that a trained model is read against.

The model of order n, with history ``h`` (the n-1 tokens before) and ``h'`` (``h`` without its oldest token), is

    p_n(w | h) = max(c(h w) - D(c(h w)), 0) / c(h) + gamma(h) p_{n-1}(w | h'),    p_0(w) = 1 / vocab_size

where ``c`` are raw counts at the highest order and continuation counts ``N1+(. h w)`` (how many different tokens stand
to the left) below it, and ``gamma(h)`` is the mass that the discounts ``D`` set free (Kneser & Ney 1995; modified form
with three discounts by Chen & Goodman 1999). An unseen history has ``gamma = 1``. Nothing stands to the left of a
document's first token, and the scores there come from the lower orders: each occurrence of ``h w`` (``h`` not empty)
at a document's start adds one to ``N1+(. h w)``. Where documents begin with a symbol of their own, those counts are the
raw ones (Heafield et al. 2013, "Scalable Modified Kneser-Ney Language Model Estimation", section 3).

An n-gram is one uint64: the ids packed side by side, the oldest in the highest bits. Sorted keys therefore keep the
n-grams of one history together, and every look-up is a binary search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tnl.errors import ConfigError, DataError

Window = np.ndarray | tuple[np.ndarray, np.ndarray]

KEY_BITS = 64


class NgramModel:
    """An interpolated Kneser-Ney model of one order; made by `NgramModel.count`, never changed afterwards."""

    def __init__(self, vocab_size: int, counts: Sequence[_Counts], openings: Sequence[_Counts]):
        """``counts[k - 1]``: the raw counts of the k-grams, for k = 1 ... order; ``openings[k - 1]``: of those
        of them that begin a document."""
        self.vocab_size = vocab_size
        self.order = len(counts)
        self._counts, self._openings = list(counts), list(openings)
        self._bits = _token_bits(vocab_size)
        lower = [_continuation_counts(counts[k], openings[k - 1], k * self._bits) for k in range(1, self.order)]
        self._levels = [_discount(level, self._bits) for level in [*lower, counts[-1]]]

    @classmethod
    def count(cls, windows: Iterable[Window], vocab_size: int, order: int) -> NgramModel:
        """Count the n-grams of ``windows`` and return the model of the given order.

        ``windows``: each an integer array ``[T]`` or ``[N, T]`` (rows are windows) of consecutive token ids, or a pair
        of such an array and its document starts: a boolean mask of the same shape, or positions in the flattened array.
        N-grams cross neither windows, nor rows, nor document starts; a row begins amid a document unless its first
        token is given as a start. All tokens are held at once, at 6 bytes each,
        beside one order's keys of 8 bytes.

        Raises ConfigError if ``order`` packed ids of this vocabulary do not fit a uint64, DataError for ids outside of
        ``[0, vocab_size)``, arrays of another shape or type, and windows that hold no n-gram of this order.
        """
        bits = _token_bits(vocab_size)
        if order < 1 or order * bits > KEY_BITS:
            raise ConfigError(
                f"n-gram order {order} with a vocabulary of {vocab_size}: choose an order from 1 to {KEY_BITS // bits}"
                f" ({bits} bits a token, {KEY_BITS} bits a key)"
            )
        tokens, depths, begins = [np.empty(0, np.uint32)], [np.empty(0, np.uint8)], [np.empty(0, bool)]
        for window in windows:
            ids, starts = window if isinstance(window, tuple) else (window, None)
            ids = _checked_tokens(ids, vocab_size, max_ndim=2)
            tokens.append(ids.ravel())
            begins.append(_document_starts(ids.shape, starts))
            depths.append(_depths(ids.shape, begins[-1], order))
        tokens, depths, begins = map(np.concatenate, (tokens, depths, begins))  # [total tokens]
        if not (depths == order - 1).any():
            raise DataError(
                f"no {order}-gram to count in {tokens.size} tokens: pass windows of at least {order} tokens"
            )
        counted = [_raw_counts(tokens, depths, begins, k, bits) for k in range(1, order + 1)]
        return cls(vocab_size, *zip(*counted, strict=True))

    def at_order(self, order: int) -> NgramModel:
        """The model of a lower order from the same counts: the bigram of a trigram costs no second pass over the data.

        Raises ConfigError unless ``1 <= order <= self.order``.
        """
        if not 1 <= order <= self.order:
            raise ConfigError(f"n-gram order {order} was not counted: choose one from 1 to {self.order}")
        return NgramModel(self.vocab_size, self._counts[:order], self._openings[:order])

    def log_prob(self, tokens: np.ndarray, document_starts: np.ndarray) -> np.ndarray:
        """Log-probability in nats of every token but the first of each document, in the order of the text.

        ``tokens``: integer ``[T]``. ``document_starts``: the position of each document's first token, or a boolean mask
        ``[T]``; position 0 always starts one. Returns float64 ``[T - number of documents]``. The history ends at the
        document's start: the token in place k+1 of a document has k tokens before it and is scored by the distribution
        of order ``min(k + 1, order)``.

        Raises DataError for ids outside of the vocabulary, arrays of another shape or type, and text with nothing to
        score.
        """
        tokens = _checked_tokens(tokens, self.vocab_size, max_ndim=1)
        # At least 2, so that first tokens (depth 0) can be told from the others when the order is 1.
        begins = _document_starts(tokens.shape, document_starts)
        depths = _depths(tokens.shape, begins, max(self.order, 2))
        scored = np.flatnonzero(depths)  # [S]
        if not scored.size:
            raise DataError(f"no token to score in {tokens.size} tokens: every one is the first of its document")
        probability = np.full(scored.size, 1.0 / self.vocab_size)
        keys = np.zeros(scored.size, np.uint64)
        for k, level in enumerate(self._levels, start=1):
            rows = np.flatnonzero(depths[scored] >= k - 1)
            oldest = tokens[scored[rows] - (k - 1)].astype(np.uint64)
            keys[rows] |= oldest << np.uint64((k - 1) * self._bits)
            probability[rows] = level.interpolate(keys[rows], probability[rows], self._bits)
        return np.log(probability)


def evaluate_ngrams(
    train_windows_factory: Callable[[], Iterable[Window]],
    heldout_tokens: np.ndarray,
    heldout_document_starts: np.ndarray,
    vocab_size: int,
    orders: Sequence[int] = (2, 3),
) -> dict[int, float]:
    """Mean held-out loss of the n-gram model of each order, in nats per predicted token.

    ``train_windows_factory()`` gives the windows that `NgramModel.count` takes; it is called once, the lower orders
    share the counts of the highest. The held-out arguments, and the tokens that are predicted, are those of
    `NgramModel.log_prob`.

    Raises what `NgramModel.count` and `NgramModel.log_prob` raise, and ConfigError for no orders.
    """
    if not orders:
        raise ConfigError("no n-gram orders to evaluate: pass at least one, for example (2, 3)")
    highest = NgramModel.count(train_windows_factory(), vocab_size, max(orders))
    losses = {}
    for order in orders:
        model = highest if order == highest.order else highest.at_order(order)
        losses[order] = float(-model.log_prob(heldout_tokens, heldout_document_starts).mean())
    return losses


@dataclass(frozen=True)
class _Counts:
    """How often each n-gram of one order occurs."""

    keys: np.ndarray  # [M] uint64, sorted, distinct
    counts: np.ndarray  # [M] int64, at least 1


@dataclass(frozen=True)
class _Level:
    """The discounted distribution of one order."""

    keys: np.ndarray  # [M] uint64, sorted n-grams
    discounted: np.ndarray  # [M] float64, (c(h w) - D) / c(h)
    histories: np.ndarray  # [C] uint64, sorted
    gammas: np.ndarray  # [C] float64, the weight of the lower order

    def interpolate(self, keys: np.ndarray, lower: np.ndarray, bits: int) -> np.ndarray:
        """Probabilities ``[S]`` of the n-grams ``keys [S]``, given those of the order below, ``lower [S]``."""
        return _look_up(self.histories, self.gammas, keys >> np.uint64(bits), missing=1.0) * lower + _look_up(
            self.keys, self.discounted, keys, missing=0.0
        )


def _token_bits(vocab_size: int) -> int:
    """Bits that hold every id below ``vocab_size``."""
    if vocab_size < 2:
        raise ConfigError(f"vocabulary of {vocab_size} tokens: an n-gram model needs at least 2")
    return (vocab_size - 1).bit_length()


def _checked_tokens(tokens: np.ndarray, vocab_size: int, max_ndim: int) -> np.ndarray:
    """``tokens`` as uint32, after checks of type, shape and range."""
    tokens = np.asarray(tokens)
    if tokens.dtype.kind not in "iu" or not 1 <= tokens.ndim <= max_ndim:
        shapes = "[T]" if max_ndim == 1 else "[T] or [N, T]"
        raise DataError(f"tokens are {tokens.dtype} of shape {tokens.shape}: pass integer token ids {shapes}")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise DataError(f"token ids from {tokens.min()} to {tokens.max()}: they must lie in [0, {vocab_size})")
    return tokens.astype(np.uint32)


def _document_starts(shape: tuple[int, ...], starts: np.ndarray | None) -> np.ndarray:
    """``starts``, positions or a mask of ``shape``, as a boolean mask, flattened; None gives none."""
    is_start = np.zeros(shape, bool).ravel()
    if starts is None:
        return is_start
    starts = np.asarray(starts)
    if starts.dtype == bool and starts.shape == shape:
        return starts.ravel()
    if starts.dtype.kind not in "iu" or starts.ndim != 1:
        found = f"{starts.dtype} of shape {starts.shape}"
        raise DataError(f"document starts are {found}: pass positions [N] or a boolean mask {shape}")
    if starts.size and (starts.min() < 0 or starts.max() >= is_start.size):
        raise DataError(f"document starts from {starts.min()} to {starts.max()} in {is_start.size} tokens")
    is_start[starts] = True
    return is_start


def _depths(shape: tuple[int, ...], begins: np.ndarray, order: int) -> np.ndarray:
    """How many tokens of its own row and document stand before each token, at most ``order - 1``: uint8, flattened."""
    is_start = np.zeros(shape, bool)
    is_start[..., :1] = True
    is_start = is_start.ravel() | begins
    places = np.arange(is_start.size)
    last_start = np.maximum.accumulate(np.where(is_start, places, 0))
    return np.minimum(places - last_start, order - 1).astype(np.uint8)


def _raw_counts(
    tokens: np.ndarray, depths: np.ndarray, begins: np.ndarray, k: int, bits: int
) -> tuple[_Counts, _Counts]:
    """Occurrences of each k-gram, and of those among them that begin a document; one that would reach over a start is
    none."""
    ends = np.flatnonzero(depths >= k - 1)
    keys = np.zeros(ends.size, np.uint64)
    for back in range(k):
        keys |= tokens[ends - back].astype(np.uint64) << np.uint64(back * bits)
    # A document's first token is never predicted, so as a unigram it takes no probability from others.
    openings = keys[begins[ends - (k - 1)]] if k > 1 else keys[:0]
    return _Counts(*np.unique(keys, return_counts=True)), _Counts(*np.unique(openings, return_counts=True))


def _continuation_counts(longer: _Counts, openings: _Counts, key_bits: int) -> _Counts:
    """``N1+(. g)``: how many different tokens precede each n-gram ``g`` of ``key_bits`` bits, a document's start
    counted each time."""
    without_oldest = longer.keys & np.uint64((1 << key_bits) - 1)
    preceded = _Counts(*np.unique(without_oldest, return_counts=True))
    keys, places = np.unique(np.concatenate([preceded.keys, openings.keys]), return_inverse=True)
    counts = np.zeros(keys.size, np.int64)
    np.add.at(counts, places, np.concatenate([preceded.counts, openings.counts]))
    return _Counts(keys, counts)


def _discount(table: _Counts, bits: int) -> _Level:
    """Discount one order's counts and hand what is set free to the order below."""
    histories, first = np.unique(table.keys >> np.uint64(bits), return_index=True)
    discounts = _discounts(table.counts)[np.minimum(table.counts, 3)]  # [M]
    totals = np.add.reduceat(table.counts, first)  # [C]
    members = np.diff(np.append(first, table.keys.size))
    return _Level(
        keys=table.keys,
        discounted=(table.counts - discounts) / np.repeat(totals, members),
        histories=histories,
        gammas=np.add.reduceat(discounts, first) / totals,
    )


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Absolute discounts of the counts 1, 2 and 3 or more, at index 1, 2 and 3 (Chen & Goodman 1999).

    With ``n_i`` n-grams that occur i times and ``Y = n_1 / (n_1 + 2 n_2)``: ``D_i = i - (i + 1) Y n_{i+1} / n_i``.
    Small or uniform data can leave an ``n_i`` empty or put a ``D_i`` outside of ``(0, i)``, where probabilities would
    be zero or negative. Then one discount ``Y`` serves all counts (Kneser & Ney 1995), and 1/2 where ``Y`` itself is
    not in ``(0, 1)``.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)
    plain = n[1] / (n[1] + 2 * n[2]) if n[1] and n[2] else 0.5
    if n[1:5].all():
        i = np.arange(1, 4)
        modified = i - (i + 1) * plain * n[2:5] / n[1:4]
        if ((modified > 0) & (modified < i)).all():
            return np.concatenate([[0.0], modified])
    return np.array([0.0, plain, plain, plain])


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float) -> np.ndarray:
    """``values`` of ``wanted`` in the sorted ``keys``, and ``missing`` for those that are not there."""
    index = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[index] == wanted, values[index], missing)
