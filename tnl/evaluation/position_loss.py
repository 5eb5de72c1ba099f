"""Loss by the position in a text, as far beyond the length of training as one likes."""

from dataclasses import dataclass

import numpy as np
import torch

from tnl.errors import NonFiniteError
from tnl.evaluation.prefix_reader import on_device
from tnl.evaluation.standard_error import standard_error
from tnl.evaluation.state_reader import PIECE_TOKENS
from tnl.evaluation.token_scores import token_scores
from tnl.model.state import TransnormerState


@dataclass(frozen=True, eq=False)
class PositionLoss:
    """Mean losses of texts of L tokens in buckets of positions.

    Attributes:
        edges: int64 [buckets + 1] from 0 to L; bucket i predicts the tokens ``edges[i] + 1`` to ``edges[i + 1]`` of a
            text, each behind all before it.
        losses: nats per token, fp64 [texts, buckets].
    """

    edges: np.ndarray
    losses: np.ndarray

    def rows(self) -> list[dict]:
        """Figures of each bucket as JSON values; standard errors are over the texts, of which each is one sample."""
        means = self.losses.mean(0)
        return [
            {
                "begin": int(self.edges[i]),
                "end": int(self.edges[i + 1]),
                "loss": float(means[i]),
                "loss_stderr": standard_error(self.losses[:, i]),
                "perplexity": float(np.exp(means[i])),
            }
            for i in range(len(means))
        ]


@torch.no_grad()
def position_loss(model, texts: np.ndarray, num_buckets: int, piece_tokens: int = PIECE_TOKENS) -> PositionLoss:
    """Loss of every token behind all before it, in constant memory.

    Args:
        texts: ids int64 [N, 1 + L]; the first of each is only read.
        num_buckets: of equal width, or nearly, at most L.
        piece_tokens: of a forward pass over all texts.

    Raises:
        NonFiniteError: a loss is not finite.
    """
    N, L = texts.shape[0], texts.shape[1] - 1
    edges = np.linspace(0, L, num_buckets + 1).round().astype(np.int64)
    sums, state, columns = np.zeros((N, num_buckets)), TransnormerState(), max(1, piece_tokens // N)
    for start in range(0, L, columns):
        stop = min(start + columns, L)
        ids = on_device(np.ascontiguousarray(texts[:, start:stop]), model.device)
        targets = on_device(np.ascontiguousarray(texts[:, start + 1 : stop + 1]), model.device)
        hidden = model.model(ids, past_key_values=state, use_cache=True).last_hidden_state  # [N, columns, D]
        scores, _ = token_scores(model, hidden.flatten(0, 1), targets.flatten())
        values = scores.view(N, stop - start).double().cpu().numpy()
        if not np.isfinite(values).all():
            raise NonFiniteError(
                f"positions {start:,} to {stop:,}: a loss is not finite; evaluate in float32, or another checkpoint"
            )
        buckets = np.searchsorted(edges, np.arange(start, stop), side="right") - 1
        np.add.at(sums, (slice(None), buckets), -values)
    return PositionLoss(edges, sums / np.diff(edges))
