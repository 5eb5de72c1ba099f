"""Reading a text of any length into a state, in pieces, and scoring what may follow it."""

from collections.abc import Sequence

import numpy as np
import torch

from tnl.evaluation.prefix_reader import on_device
from tnl.evaluation.token_scores import token_scores
from tnl.model.state import TransnormerState

PIECE_TOKENS = 2**14  # of a forward pass


@torch.no_grad()
def read(model, ids: np.ndarray, state: TransnormerState, piece_tokens: int = PIECE_TOKENS) -> None:
    """Let ``state``, of one sequence, read ``ids`` int64 [T]."""
    for start in range(0, len(ids), piece_tokens):
        piece = on_device(ids[start : start + piece_tokens], model.device)
        model.model(piece[None], past_key_values=state, use_cache=True)


@torch.no_grad()
def score_answers(
    model, state: TransnormerState, last: int, answers: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods of continuations in nats, fp64 [N], and whether greedy decoding gives each, bool [N].

    Args:
        state: of one sequence, of all that stands before ``last``; not changed. It must have read something.
        last: the token before the answers.
        answers: ids int64 [T] each, at least one.
    """
    read_ids = np.concatenate([np.concatenate([[last], answer[:-1]]) for answer in answers])
    offsets = np.cumsum([0, *map(len, answers)])
    output = model.model(
        on_device(read_ids, model.device)[None],
        cu_seqlens=on_device(offsets.astype(np.int32), model.device),
        past_key_values=state.continued(torch.zeros(len(answers), dtype=torch.int64)),
        use_cache=False,
    )
    scores, greedy = token_scores(
        model, output.last_hidden_state[0], on_device(np.concatenate(answers), model.device)
    )  # fmt: skip
    sums = np.add.reduceat(scores.double().cpu().numpy(), offsets[:-1])
    return sums, np.logical_and.reduceat(greedy.cpu().numpy(), offsets[:-1])
