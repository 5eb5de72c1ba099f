"""Parameter and operation counts of a TNL model, from its configuration alone."""

from tnl.model.configuration import TransnormerConfig


def matmul_parameters(config: TransnormerConfig) -> int:
    """Weights that multiply every token: the blocks' linear layers and the output head, not the embedding look-up."""
    D, hidden, F = config.decoder_embed_dim, config.hidden_dim, config.glu_dim
    mixer = 5 * D * hidden
    if config.gate_dim is not None:
        mixer = 4 * D * hidden + config.gate_dim * (D + hidden)
    return config.decoder_layers * (mixer + 3 * D * F) + D * config.vocab_size


def num_parameters(config: TransnormerConfig) -> int:
    """All trained parameters, a tied head counted once."""
    thetas = sum(config.uses_lrpe(i) for i in range(config.decoder_layers)) * config.hidden_dim
    untied = 0 if config.tie_word_embeddings else config.decoder_embed_dim * config.vocab_size
    return matmul_parameters(config) + thetas + untied


def training_flops_per_token(config: TransnormerConfig) -> int:
    """Floating-point operations of the forward and backward pass per token, a multiply-add counted as two.

    Each matmul weight costs 6. Linear attention is counted as its recurrence, which is what the mathematics needs:
    per head 2 K V for the state update and 2 K V for the output, three times over for the backward pass; LRPE
    doubles K. The extra products that a chunked implementation makes inside its chunks, and recomputation under
    gradient checkpointing, are not counted, so the number does not depend on the implementation or on the sequence
    length.
    """
    K = config.head_dim
    per_layer = 4 * config.decoder_attention_heads * K * K
    lrpe_layers = sum(config.uses_lrpe(i) for i in range(config.decoder_layers))
    return 6 * matmul_parameters(config) + 3 * per_layer * (config.decoder_layers + lrpe_layers)
