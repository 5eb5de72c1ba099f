"""`TransnormerConfig`: the hyper-parameters of a TNL model, under the names of the released checkpoints."""

from dataclasses import fields

import torch
from transformers import PreTrainedConfig

from tnl.model.decay import DECAYS
from tnl.model.loading import screened_config
from tnl.model.lrpe import PHASE_DTYPES

_SIZES = ("vocab_size", "decoder_embed_dim", "decoder_layers", "decoder_attention_heads", "hidden_dim", "glu_dim")
_FLAGS = ("no_scale_embedding", "use_cache", "tie_word_embeddings")
MIXER_NORMS = ("simplermsnorm", "layernorm")


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
        linear_act_fun: activation of q and k (with ``gate_dim`` of v, too), ``silu`` or its other name ``swish``, or
            ``none``.
        decay: ``released`` (what the checkpoints compute), ``paper`` (arXiv 2307.14995 Eq. 10) or ``none``.
        no_scale_embedding: False multiplies the embeddings by sqrt(D).
        gate_dim: None for the token mixer of TransNormerLLM and TransNormerLLM2 (``qkvu_proj``: the gate u is a
            projection of its own). A number for that of TransNormerLLM3 (``qkv_proj``, activation also on v, a sigmoid
            gate through ``output_gate`` of this rank, 16 in the 15B). It is the presence of this key that selects the
            mixer; a 15B config.json without it needs ``"gate_dim": 16``.
        mixer_norm_type: norm of the attention's output under the gate, ``simplermsnorm`` or ``layernorm`` (without
            weight). What the 15B was trained with is not known for sure; its model card names SRMSNorm.
        lrpe_phase_dtype: ``float32`` for exact phases; ``activation`` to reproduce the released code, which rounds
            positions, angles and phases to the dtype of the activations.
        norm_type: ``simplermsnorm``, the norm between the blocks' parts, the only one of TNL.
        bias: linear layers with bias; the released models have none and neither does this one.
        init_std: standard deviation of the initial weights.

    Raises:
        ValueError: a value outside these.
    """

    model_type = "transnormer"
    tokenizer_class = "TransnormerTokenizer"  # for folders whose tokenizer_config.json names none
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
    gate_dim: int | None = None
    mixer_norm_type: str = "simplermsnorm"
    lrpe_phase_dtype: str = "float32"
    no_scale_embedding: bool = False
    norm_type: str = "simplermsnorm"
    bias: bool = False
    init_std: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers; see `from_dict`."""
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, but the content of a file must be that of a TNL model's.

        Raises:
            ValueError: a key that would choose code to run, or that nobody knows, or two names of one setting with
                different values, named with their file; a value, here or in ``kwargs``, that no model has.
        """
        file = f"{kwargs['name_or_path']}/config.json" if kwargs.get("name_or_path") else "config.json"
        known = [field.name for field in fields(cls)] + list(cls.attribute_map)
        values = screened_config(config_dict, known, file)
        for alias, name in cls.attribute_map.items():
            if alias in values and name in values and values[alias] != values[name]:
                raise ValueError(
                    f"{file}: {alias}: {values[alias]!r} and {name}: {values[name]!r} are one setting; delete one"
                )
        found = super().from_dict(values, **kwargs)
        # Again: transformers puts ``kwargs`` into the finished configuration.
        (found[0] if isinstance(found, tuple) else found)._check_values()
        return found

    @classmethod
    def from_json_file(cls, json_file):
        """As in transformers; see `from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def __post_init__(self, **kwargs):
        dtype = kwargs.get("torch_dtype") if self.dtype is None else self.dtype
        # transformers would take any attribute of torch.
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not isinstance(found, torch.dtype):
            raise ValueError(f"TransnormerConfig: dtype: {dtype!r} is unknown, use bfloat16, float16 or float32")
        super().__post_init__(**kwargs)
        if self.hidden_dim is None:
            self.hidden_dim = self.decoder_embed_dim
        if self.linear_use_lrpe_list is None:
            self.linear_use_lrpe_list = [1]
        self._check_values()

    def _check_values(self) -> None:
        sizes = {name: getattr(self, name) for name in _SIZES}
        wrong = {name: size for name, size in sizes.items() if not _is_size(size)}
        problems = [f"{name}: {size!r} must be a whole number of at least 1" for name, size in wrong.items()]
        if not wrong and self.hidden_dim % self.decoder_attention_heads:
            problems.append(
                f"decoder_attention_heads: {self.decoder_attention_heads} does not divide {self.hidden_dim}"
            )
        if self.norm_type != "simplermsnorm":
            problems.append(f"norm_type: {self.norm_type!r} is unknown, use simplermsnorm")
        flags = {name: getattr(self, name) for name in _FLAGS}
        # The text "false" would be true.
        problems += [
            f"{name}: {flag!r} must be true or false" for name, flag in flags.items() if flag not in (True, False)
        ]
        if not isinstance(self.init_std, int | float) or not 0 <= self.init_std < float("inf"):
            problems.append(f"init_std: {self.init_std!r} must be a number of at least 0")
        if self.gate_dim is not None and not _is_size(self.gate_dim):
            problems.append(f"gate_dim: {self.gate_dim!r} must be a whole number of at least 1, or null")
        if self.mixer_norm_type not in MIXER_NORMS:
            problems.append(
                f"mixer_norm_type: {self.mixer_norm_type!r} is unknown, use one of {', '.join(MIXER_NORMS)}"
            )
        if self.lrpe_phase_dtype not in PHASE_DTYPES:
            problems.append(
                f"lrpe_phase_dtype: {self.lrpe_phase_dtype!r} is unknown, use one of {', '.join(PHASE_DTYPES)}"
            )
        if self.linear_act_fun not in ("silu", "swish", "none"):
            problems.append(f"linear_act_fun: {self.linear_act_fun!r} is unknown, use silu, swish or none")
        if self.decay not in DECAYS:
            problems.append(f"decay: {self.decay!r} is unknown, use one of {', '.join(DECAYS)}")
        if self.bias:
            problems.append("bias: true is not supported, no TransNormerLLM has biases")
        lrpe_layers = self.linear_use_lrpe_list
        if not isinstance(lrpe_layers, list | tuple) or any(entry not in (0, 1) for entry in lrpe_layers):
            problems.append(f"linear_use_lrpe_list: {lrpe_layers!r} must be a list of 0 and 1")
        elif not wrong and len(lrpe_layers) > self.decoder_layers:
            problems.append(f"linear_use_lrpe_list: {len(lrpe_layers)} entries for {self.decoder_layers} layers")
        if problems:
            raise ValueError("TransnormerConfig: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        """Width of one head, K = V."""
        return self.hidden_dim // self.decoder_attention_heads

    def uses_lrpe(self, layer: int) -> bool:
        """Whether ``layer`` rotates q and k by LRPE."""
        return layer < len(self.linear_use_lrpe_list) and bool(self.linear_use_lrpe_list[layer])


def _is_size(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
