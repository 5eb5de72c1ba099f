"""LoRA on a TNL model: which layers it adapts, what must go together where the head is the embedding, and its files."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel

from tnl.model.configuration import TransnormerConfig

EMBEDDINGS = ("embed_tokens", "lm_head")
# Where peft keeps the layer that it adapts.
ADAPTED = "base_layer"


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


def check_targets(model: nn.Module, targets: list[str]) -> None:
    """Refuse names that no linear layer of ``model`` has.

    Raises:
        ValueError: names them, and those there are.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in layers)]
    if unknown:
        known = ", ".join(lora_targets(model.config))
        raise ValueError(f"method.targets: the model has no linear layer {', '.join(unknown)}; its blocks have {known}")


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> None:
    """Put adapters into ``model``, which stays what it is; they alone train.

    Their initial values are drawn from torch's random numbers.
    """
    inject_adapter_in_model(config, model)


def is_adapter(name: str) -> bool:
    """Whether a parameter of a model with adapters is one of theirs."""
    return ".lora_" in name


def save_adapters(
    model: PreTrainedModel, config: LoraConfig, weights: dict[str, torch.Tensor], folder: Path, *, merge: bool
) -> None:
    """Write an adapter as peft does, or the model with the adapter merged into its weights.

    Args:
        model: the base, in fp32; it is changed.
        weights: of the adapters, under the names that they have in the model after `add_adapters`.

    Raises:
        ValueError: the weights are not those of an adapter by ``config`` on ``model``.
    """
    adapted = get_peft_model(model, config)
    named = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    found = adapted.load_state_dict(named, strict=False)
    wrong = [*filter(is_adapter, found.missing_keys), *found.unexpected_keys]
    if wrong:
        raise ValueError(f"the adapter's weights do not fit the base: {', '.join(wrong)}")
    if merge:
        adapted.merge_and_unload().save_pretrained(folder)
    else:
        adapted.save_pretrained(folder)
