"""Held-out loss over the tokens that carry a label, of micro-batches of instruction data."""

from collections.abc import Callable, Iterable

import torch

from tnl.evaluation.heldout import HeldoutLoss


@torch.no_grad()
def answer_loss(
    model: torch.nn.Module,
    batches: Iterable[dict],
    *,
    device: torch.device,
    sums: Callable[[list[float]], list[float]] = lambda values: values,
) -> HeldoutLoss:
    """Loss of ``model`` over the labelled tokens of ``batches``.

    Args:
        model: `TransnormerForCausalLM`, or a DeepSpeed engine around one.
        batches: this rank's, packed, with input_ids, labels and cu_seqlens; as many as on every other rank.
        sums: sums a list over the ranks.
    """
    was_training = model.training
    model.eval()
    loss_sum, predicted, tokens = 0.0, 0, 0
    for batch in batches:
        inputs = {name: batch[name].to(device) for name in ("input_ids", "labels", "cu_seqlens")}
        output = model(**inputs, use_cache=False)
        loss_sum += output.loss_sum.item()
        predicted += output.num_tokens.item()
        tokens += batch["input_ids"].numel()
    model.train(was_training)
    loss_sum, predicted, tokens = sums([loss_sum, float(predicted), float(tokens)])
    return HeldoutLoss(loss_sum, int(predicted), int(tokens), None)
