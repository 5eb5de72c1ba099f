"""`TransnormerConfig`: the hyper-parameters of a TNL model, under the names of the released checkpoints."""

from transformers import PreTrainedConfig

from tnl.model.decay import DECAYS

_SIZES = ("vocab_size", "decoder_embed_dim", "decoder_layers", "decoder_attention_heads", "hidden_dim", "glu_dim")


class TransnormerConfig(PreTrainedConfig):
    """Configuration of `TransnormerModel`.

    Args:
        vocab_size: number of token ids.
        decoder_embed_dim: model width D (alias ``hidden_size``).
        decoder_layers: number of layers L (alias ``num_hidden_layers``).
        decoder_attention_heads: number of heads H (alias ``num_attention_heads``); must divide ``hidden_dim``.
        hidden_dim: total width of the heads, H * head_dim; None means ``decoder_embed_dim``.
        glu_dim: hidden width F of the gated linear unit (alias ``intermediate_size``).
        linear_use_lrpe_list: 1 for each layer that rotates q and k by LRPE, 0 otherwise; shorter lists mean 0 for
            the rest.
        linear_act_fun: activation of q and k, ``silu`` or its other name ``swish``, or ``none``.
        decay: ``released`` (what the checkpoints compute), ``paper`` (arXiv 2307.14995 Eq. 10) or ``none``.
        no_scale_embedding: False multiplies the embeddings by sqrt(D).
        norm_type: ``simplermsnorm``, the only norm of TNL.
        bias: linear layers with bias; the released models have none and neither does this one.
        init_std: standard deviation of the initial weights.

    Raises:
        ValueError: a value outside these.
    """

    model_type = "transnormer"
    attribute_map = {  # noqa: RUF012 - transformers' own declaration
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
        "intermediate_size": "glu_dim",
        "initializer_range": "init_std",
    }
    keys_to_ignore_at_inference = ["past_key_values", "loss_sum", "num_tokens"]  # noqa: RUF012

    vocab_size: int = 64000
    decoder_embed_dim: int = 1024
    decoder_layers: int = 24
    decoder_attention_heads: int = 8
    hidden_dim: int | None = None
    glu_dim: int = 2816
    linear_use_lrpe_list: list[int] | tuple[int, ...] | None = None
    linear_act_fun: str = "silu"
    decay: str = "released"
    no_scale_embedding: bool = False
    norm_type: str = "simplermsnorm"
    bias: bool = False
    init_std: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        # Checkpoints that name remote code are run with the classes here, and saved without that name.
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        if self.hidden_dim is None:
            self.hidden_dim = self.decoder_embed_dim
        if self.linear_use_lrpe_list is None:
            self.linear_use_lrpe_list = [1]
        sizes = {name: getattr(self, name) for name in _SIZES}
        wrong = {name: size for name, size in sizes.items() if not isinstance(size, int) or size < 1}
        problems = [f"{name}: {size!r} must be a whole number of at least 1" for name, size in wrong.items()]
        if not wrong and self.hidden_dim % self.decoder_attention_heads:
            problems.append(
                f"decoder_attention_heads: {self.decoder_attention_heads} does not divide {self.hidden_dim}"
            )
        if self.norm_type != "simplermsnorm":
            problems.append(f"norm_type: {self.norm_type!r} is unknown, use simplermsnorm")
        if self.linear_act_fun not in ("silu", "swish", "none"):
            problems.append(f"linear_act_fun: {self.linear_act_fun!r} is unknown, use silu, swish or none")
        if self.decay not in DECAYS:
            problems.append(f"decay: {self.decay!r} is unknown, use one of {', '.join(DECAYS)}")
        if self.bias:
            problems.append("bias: true is not supported, no TransNormerLLM has biases")
        if not wrong and len(self.linear_use_lrpe_list) > self.decoder_layers:
            problems.append(
                f"linear_use_lrpe_list: {len(self.linear_use_lrpe_list)} entries for {self.decoder_layers} layers"
            )
        if problems:
            raise ValueError("TransnormerConfig: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        """Width of one head, K = V."""
        return self.hidden_dim // self.decoder_attention_heads

    def uses_lrpe(self, layer: int) -> bool:
        """Whether ``layer`` rotates q and k by LRPE."""
        return layer < len(self.linear_use_lrpe_list) and bool(self.linear_use_lrpe_list[layer])
