"""Linear projection and cross-entropy together, without keeping the logits."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
# Logits of this many elements are held at a time: 8 MiB in fp32 stay in a CPU's cache.
CHUNK_ELEMENTS = 2**21


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made together with the loss, chunk by chunk, so that the logits [N, vocabulary] never exist
    as a whole."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = max(64, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], labels[start : start + rows]
            logits = F.linear(part, weight).float()  # [rows, vocabulary]
            keep = target != IGNORE_INDEX
            index = torch.where(keep, target, 0).unsqueeze(1)
            picked = logits.gather(1, index).squeeze(1)
            lse = torch.logsumexp(logits, 1)
            loss += torch.where(keep, lse - picked, 0.0).sum()
            if need_hidden or need_weight:
                grad = logits.sub_(lse.unsqueeze(1)).exp_()
                grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0))
                grad.mul_(keep.unsqueeze(1))
                grad = grad.to(weight.dtype)
                if need_hidden:
                    torch.mm(grad, weight, out=dhidden[start : start + rows])
                if need_weight:
                    dweight += torch.mm(grad.t(), part)
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dhidden, dweight = ctx.saved_tensors
        # Multiplied in fp32: a scale rounded to bf16 would bias every gradient by up to 0.4 %.
        return (
            None if dhidden is None else (dhidden.float() * dloss).to(ctx.dtype),
            None if dweight is None else (dweight * dloss).to(ctx.dtype),
            None,
        )


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the labelled rows of ``logsumexp(W h) - (W h)[label]``, in nats.

    Args:
        hidden: [N, D].
        weight: [vocabulary, D], same dtype as ``hidden``.
        labels: int64 [N]; `IGNORE_INDEX` (-100) marks rows without a label.

    Returns:
        The loss sum, fp32 scalar with gradients to ``hidden`` and ``weight``, and the number of labelled rows, int64
        scalar.
    """
    if not torch.is_grad_enabled():
        # Otherwise a parameter asks for its gradient all the same, which is most of the work.
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels), (labels != IGNORE_INDEX).sum()
