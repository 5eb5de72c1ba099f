"""Models small enough for a test, whose weights are large enough that every part of the model shows in the logits."""

import torch

from tnl.model import TransnormerConfig, TransnormerForCausalLM

VOCAB = 61


def tiny_config(**values) -> TransnormerConfig:
    """Two layers of four heads with LRPE in layer 0 and no end-of-text token; ``values`` replace."""
    defaults = dict(
        vocab_size=VOCAB,
        decoder_embed_dim=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        glu_dim=48,
        no_scale_embedding=True,
        init_std=0.2,
        eos_token_id=None,
    )
    return TransnormerConfig(**(defaults | values))


def tiny_model(seed: int = 0, **values) -> TransnormerForCausalLM:
    """A `tiny_config` model in evaluation mode with random weights; the caller's random state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TransnormerForCausalLM(tiny_config(**values)).eval()


def random_ids(*shape: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """Token ids int64 [shape] that are not special (0, 1, 2)."""
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))
