"""The kinds of language model that the training loop takes: TNL, and the LLaMA that it is compared with."""

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tnl.model import flops
from tnl.model.baseline import llama_config, llama_num_parameters, llama_training_flops_per_token
from tnl.model.baseline_training import LlamaBaseline
from tnl.model.configuration import TransnormerConfig
from tnl.model.modeling import TransnormerForCausalLM
from tnl.model.settings import ModelSettings

ModelConfig = TransnormerConfig | LlamaConfig


def model_config(settings: ModelSettings, max_tokens: int) -> ModelConfig:
    """The configuration of a model to train.

    Args:
        max_tokens: of a training window; a LLaMA's ``max_position_embeddings``.
    """
    config = settings.to_config()
    return config if settings.kind == "tnl" else llama_config(config, max_position_embeddings=max_tokens)


def model_class(config: ModelConfig) -> type[TransnormerForCausalLM] | type[LlamaBaseline]:
    """The class that is trained."""
    return LlamaBaseline if isinstance(config, LlamaConfig) else TransnormerForCausalLM


def exported_class(config: ModelConfig) -> type[PreTrainedModel]:
    """The class that writes the model's folder: for a LLaMA transformers' own, which loads it without this package."""
    return LlamaForCausalLM if isinstance(config, LlamaConfig) else TransnormerForCausalLM


def num_parameters(config: ModelConfig) -> int:
    """All trained parameters, a tied head counted once."""
    return llama_num_parameters(config) if isinstance(config, LlamaConfig) else flops.num_parameters(config)


def training_flops_per_token(config: ModelConfig, max_tokens: int) -> int:
    """Floating-point operations of the forward and backward pass per token of a window of ``max_tokens``.

    A TNL's do not depend on the length; see `tnl.model.flops` and `llama_training_flops_per_token`.
    """
    if isinstance(config, LlamaConfig):
        return llama_training_flops_per_token(config, max_tokens)
    return flops.training_flops_per_token(config)
