"""The `model` section of a run's configuration."""

from typing import Literal

from pydantic import Field, model_validator

from tnl.settings import Settings


class ModelSettings(Settings):
    """A TNL architecture. ``preset`` names a file of ``configs/model`` whose values stand where the YAML gives none."""

    preset: str | None = Field(default=None, description="name of a file in configs/model, without .yaml")
    kind: Literal["tnl", "llama"] = Field(
        default="tnl", description="tnl, or the LLaMA with as many parameters as the TNL that the other keys describe"
    )
    vocab_size: int = Field(ge=3, description="number of token ids; at least the tokenizer's")
    hidden_size: int = Field(ge=1, description="model width D")
    num_layers: int = Field(ge=1, description="number of blocks L")
    num_heads: int = Field(ge=1, description="number of heads H; must divide hidden_size")
    glu_dim: int = Field(ge=1, description="hidden width of the gated linear unit")
    lrpe_layers: tuple[int, ...] = Field(default=(0,), description="layers with LRPE on q and k")
    decay: Literal["released", "paper", "none"] = Field(default="released", description="decay of the heads")
    activation: Literal["silu", "none"] = Field(default="silu", description="activation of q and k")
    gate_dim: int | None = Field(
        default=None,
        ge=1,
        description="rank of the output gate; a number selects the token mixer of TransNormerLLM3",
    )
    mixer_norm: Literal["simplermsnorm", "layernorm"] = Field(
        default="simplermsnorm", description="norm of the attention's output under the gate"
    )
    scale_embedding: bool = Field(default=True, description="multiply embeddings by sqrt(hidden_size)")
    tie_embeddings: bool = Field(default=True, description="share the embedding matrix with the output head")
    init_std: float = Field(default=0.02, gt=0, description="standard deviation of the initial weights")

    @model_validator(mode="after")
    def _consistent(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads: {self.num_heads} does not divide hidden_size {self.hidden_size}")
        for layer in self.lrpe_layers:
            if not 0 <= layer < self.num_layers:
                raise ValueError(f"lrpe_layers: there is no layer {layer}, layers are 0 to {self.num_layers - 1}")
        if self.kind == "llama":
            from tnl.model.baseline import llama_config

            try:
                llama_config(self.to_config())
            except ValueError as error:
                text = str(error).removeprefix("decoder_embed_dim: ")
                raise ValueError(f"hidden_size: {text}, or set kind: tnl") from None
        return self

    def to_config(self, **overrides):
        """The `TransnormerConfig` of this architecture; ``overrides`` in its own names."""
        from tnl.model.configuration import TransnormerConfig

        values = dict(
            vocab_size=self.vocab_size,
            decoder_embed_dim=self.hidden_size,
            decoder_layers=self.num_layers,
            decoder_attention_heads=self.num_heads,
            glu_dim=self.glu_dim,
            linear_use_lrpe_list=[int(i in self.lrpe_layers) for i in range(self.num_layers)],
            linear_act_fun=self.activation,
            decay=self.decay,
            gate_dim=self.gate_dim,
            mixer_norm_type=self.mixer_norm,
            no_scale_embedding=not self.scale_embedding,
            tie_word_embeddings=self.tie_embeddings,
            init_std=self.init_std,
        )
        return TransnormerConfig(**(values | overrides))

    @classmethod
    def describing(cls, config) -> "ModelSettings":
        """The settings of the `TransnormerConfig` of a checkpoint: what `to_config` makes one of that size from."""
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.decoder_embed_dim,
            num_layers=config.decoder_layers,
            num_heads=config.decoder_attention_heads,
            glu_dim=config.glu_dim,
            lrpe_layers=tuple(i for i in range(config.decoder_layers) if config.uses_lrpe(i)),
            decay=config.decay,
            activation="none" if config.linear_act_fun == "none" else "silu",
            gate_dim=config.gate_dim,
            mixer_norm=config.mixer_norm_type,
            scale_embedding=not config.no_scale_embedding,
            tie_embeddings=config.tie_word_embeddings,
            init_std=config.init_std or cls.model_fields["init_std"].default,
        )
