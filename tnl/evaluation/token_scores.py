"""Log-likelihood of given tokens, and whether the model would have chosen them."""

import torch
from tnl_kernels import cross_entropy_

from tnl.model.loss import chunk_rows


@torch.no_grad()
def token_scores(
    model: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(W h)[target] in nats, in fp32 whatever the dtype of the logits, which never exist as a whole.

    Args:
        model: `TransnormerForCausalLM`.
        hidden: [M, D], after the final norm.
        targets: int64 [M], on the same device.

    Returns:
        The log-likelihoods fp32 [M], and bool [M]: whether the target has the highest logit.
    """
    scores = hidden.new_empty(len(hidden), dtype=torch.float32)
    greedy = hidden.new_empty(len(hidden), dtype=torch.bool)
    rows = chunk_rows(len(hidden), model.config.vocab_size, hidden.device)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = model.lm_head(hidden[part])  # [rows, vocabulary]
        scores[part] = -cross_entropy_(logits, targets[part], gradient=False)
        greedy[part] = logits.argmax(-1) == targets[part]
    return scores, greedy


class PendingScores:
    """Scores on their way to host memory: the next forward pass starts while they are computed.

    Attributes:
        owners: int64 [M] in host memory, whose scores they are.
    """

    def __init__(self, owners, scores: torch.Tensor, greedy: torch.Tensor):
        self.owners = owners
        self._scores, self._greedy = (values.to("cpu", non_blocking=True) for values in (scores, greedy))
        self._arrived = None
        if scores.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def arrays(self):
        """Scores fp32 [M] and greedy bool [M], as numpy arrays, when they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._scores.numpy(), self._greedy.numpy()
