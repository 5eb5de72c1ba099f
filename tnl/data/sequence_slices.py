"""One rank's slice of the windows that a group of ranks shares."""

import numpy as np
import torch

from tnl.model.loss import IGNORE_INDEX


def slice_windows(
    tokens: np.ndarray, starts: list[np.ndarray] | None, rank: int, size: int
) -> dict[str, torch.Tensor | None]:
    """Slice ``rank`` of ``size`` equal slices of each window.

    Args:
        tokens: int64 [B, L]; L a multiple of ``size``.
        starts: ascending positions at which a document starts in each window; None when a window is one text.

    Returns:
        ``input_ids`` and ``shift_labels`` (the next token of the window, also where another rank holds it; -100 where
        no token of the document follows), int64 [B, L / size], or [1, B * L / size] packed; ``cu_seqlens`` int32
        [N + 1] of the packed slices, or None; ``tokens_before`` and ``tokens_after``, int64 [B]: how many tokens the
        slice's first document has before it, and its last document after it.
    """
    B, length = tokens.shape
    piece = length // size
    begin, end = rank * piece, (rank + 1) * piece
    labels = np.full_like(tokens, IGNORE_INDEX)
    labels[:, :-1] = tokens[:, 1:]
    before, after = np.full(B, begin), np.full(B, length - end)
    bounds = [np.arange(0, B * piece + 1, piece)]
    for i, own in enumerate(starts or ()):
        own = own[own > 0]
        labels[i, own - 1] = IGNORE_INDEX
        before[i] = begin - max(own[own <= begin], default=0)
        after[i] = min(own[own >= end], default=length) - end
        bounds.append(own[(own > begin) & (own < end)] - begin + i * piece)
    shape = (B, piece) if starts is None else (1, B * piece)
    cu_seqlens = None if starts is None else torch.from_numpy(np.unique(np.concatenate(bounds)).astype(np.int32))
    return {
        "input_ids": torch.from_numpy(tokens[:, begin:end].reshape(shape)),
        "shift_labels": torch.from_numpy(labels[:, begin:end].reshape(shape)),
        "cu_seqlens": cu_seqlens,
        "tokens_before": torch.from_numpy(before),
        "tokens_after": torch.from_numpy(after),
    }
