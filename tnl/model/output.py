"""What the language model returns."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from tnl.model.state import TransnormerState


@dataclass
class TransnormerCausalLMOutput(ModelOutput):
    """Output of `TransnormerForCausalLM`.

    Attributes:
        loss: mean loss per labelled token in nats, 0 when no token is labelled.
        loss_sum: its sum, fp32 scalar; ranks and micro-batches add up `loss_sum` and `num_tokens` to weight every
            token equally.
        num_tokens: number of labelled tokens, int64 scalar.
        logits: [B, T, vocabulary]; None when labels were given, unless ``output_logits``.
        past_key_values: the `TransnormerState` after these tokens, when asked for.
    """

    loss: torch.Tensor | None = None
    loss_sum: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: TransnormerState | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
