"""The LLaMA that a TNL model is compared with: transformers' class, as many parameters, equal width and depth."""

from transformers import LlamaConfig

from tnl.model.configuration import TransnormerConfig
from tnl.model.flops import num_parameters

# The head width of every released TNL and LLaMA, for which attention kernels are made.
HEAD_DIM = 128
# The MLP's width is a multiple of this, whole tiles of a tensor core's matmul, or of a smaller power of two where
# that would take the parameter counts further apart than the tolerance.
MLP_MULTIPLE = 128
TOLERANCE = 0.005


def llama_config(config: TransnormerConfig, *, max_position_embeddings: int = 2048, **overrides) -> LlamaConfig:
    """Configuration of a LLaMA with as many parameters as the TNL of ``config``, within 0.5 %.

    Vocabulary, width, depth, tied or separate head, special tokens and initial deviation are the TNL's. Attention has
    heads of 128, each with its own keys and values, or the TNL's number of heads where 128 does not divide the width.
    The MLP is wider than the TNL's, by a third of the width (3,136 against 2,816 in the 385M): beside its gated linear
    unit a TNL block holds 5 D^2 parameters, because its output gate is a projection of its own, and a LLaMA block
    4 D^2. (With a ``gate_dim`` the gate is small, and the MLPs are equally wide.) The sum is what both models spend
    per token, so it is what is held equal.

    ``LlamaForCausalLM(llama_config(config))`` is the model, with random weights.

    Args:
        config: of the TNL.
        max_position_embeddings: longest sequence in tokens; it costs no parameters.
        overrides: other fields of `LlamaConfig`, put in place after the sizes are chosen.

    Raises:
        ValueError: the width does not divide into heads of an even size, which rotary positions need.
    """
    D, L = config.decoder_embed_dim, config.decoder_layers
    num_heads = D // HEAD_DIM if D % HEAD_DIM == 0 else config.decoder_attention_heads
    if D % (2 * num_heads):
        raise ValueError(
            f"decoder_embed_dim: {D} does not divide into {num_heads} heads of an even size, so there is no LLaMA of "
            f"this width: take a multiple of {HEAD_DIM} or of {2 * num_heads}"
        )
    embeddings = D * config.vocab_size * (1 if config.tie_word_embeddings else 2)
    norms = (2 * L + 1) * D
    total = num_parameters(config)
    width = (total - embeddings - norms - 4 * L * D * D) / (3 * L * D)  # the real number that makes them equal
    values = dict(
        vocab_size=config.vocab_size,
        hidden_size=D,
        intermediate_size=_rounded(width, TOLERANCE * total / (3 * L * D)),
        num_hidden_layers=L,
        num_attention_heads=num_heads,
        max_position_embeddings=max_position_embeddings,
        initializer_range=config.init_std,
        tie_word_embeddings=config.tie_word_embeddings,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )
    return LlamaConfig(**(values | overrides))


def llama_num_parameters(config: LlamaConfig) -> int:
    """All trained parameters, a tied head counted once."""
    D = config.hidden_size
    untied = 0 if config.tie_word_embeddings else D * config.vocab_size
    return _matmul_parameters(config) + (2 * config.num_hidden_layers + 1) * D + untied


def _matmul_parameters(config: LlamaConfig) -> int:
    D, K = config.hidden_size, config.head_dim
    attention = 2 * D * K * (config.num_attention_heads + config.num_key_value_heads)
    return config.num_hidden_layers * (attention + 3 * D * config.intermediate_size) + D * config.vocab_size


def llama_training_flops_per_token(config: LlamaConfig, length: int) -> int:
    """Floating-point operations of the forward and backward pass per token, a multiply-add counted as two.

    Each matmul weight costs 6. Attention is counted as causal: a token reads (length + 1) / 2 tokens in the mean, at 2
    K for the score and 2 K for the sum per head, three times over for the backward pass. As for a TNL, what a kernel
    computes in vain or anew is not counted. Packed documents are shorter than ``length``, so with packing the number
    is the most that a window can cost.

    Args:
        length: of the sequences, in tokens.
    """
    per_layer = 2 * config.num_attention_heads * config.head_dim * (length + 1)
    return 6 * _matmul_parameters(config) + 3 * per_layer * config.num_hidden_layers


def _rounded(width: float, allowed: float) -> int:
    """The multiple of the largest power of two up to `MLP_MULTIPLE` that is at most ``allowed`` from ``width``."""
    multiple = MLP_MULTIPLE
    while multiple > 1 and abs(round(width / multiple) * multiple - width) > allowed:
        multiple //= 2
    return max(1, round(width / multiple)) * multiple
