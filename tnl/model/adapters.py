"""LoRA on a TNL model: which layers it adapts, and what must go together where the head is the embedding."""

from peft import LoraConfig

from tnl.model.configuration import TransnormerConfig

EMBEDDINGS = ("embed_tokens", "lm_head")


def lora_targets(config: TransnormerConfig) -> list[str]:
    """Names of the linear layers of a block, the ones that LoRA is put on."""
    if config.gate_dim is None:
        mixer = ["qkvu_proj"]
    else:
        mixer = ["qkv_proj", "output_gate.0", "output_gate.1"]
    return [*mixer, "out_proj", "l1", "l2", "l3"]


def lora_config(
    config: TransnormerConfig, *, r: int = 16, lora_alpha: int = 32, lora_dropout: float = 0.0, **options
) -> LoraConfig:
    """LoRA on every linear layer of the blocks, for ``peft.get_peft_model``.

    To train the embeddings, too (new tokens, say), give ``modules_to_save=["embed_tokens"]``, all rows, or
    ``trainable_token_indices=[...]``, these rows. Where the model's head is its embedding, both stay one matrix.

    Args:
        config: of the model that is adapted.
        r, lora_alpha, lora_dropout: rank, scale times rank, dropout on the input of the adapters.
        options: other fields of ``LoraConfig``.

    Raises:
        ValueError: ``target_modules`` names the embedding or the head where they are one matrix: each would get
            an adapter of its own, and merging both into the one matrix changes the model.
    """
    options = dict(task_type="CAUSAL_LM", target_modules=lora_targets(config)) | options
    if config.tie_word_embeddings:
        targets = options["target_modules"]
        wrong = [name for name in EMBEDDINGS if not isinstance(targets, str) and name in targets]
        if wrong:
            raise ValueError(
                f"target_modules: {' and '.join(wrong)} cannot have LoRA, the model's head is its embedding; train it "
                f'with modules_to_save=["embed_tokens"] or some rows of it with trainable_token_indices'
            )
        if set(EMBEDDINGS) & set(options.get("modules_to_save") or ()):
            options["ensure_weight_tying"] = True
    return LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, **options)
