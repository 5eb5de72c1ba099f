"""Loading a model and its tokenizer for evaluation and generation."""

import torch

from tnl.errors import ConfigError


def load_model(name: str, *, dtype: torch.dtype | None = None):
    """Model in evaluation mode on the GPU if there is one, and its tokenizer.

    Args:
        name: model folder or hub name of a TNL model.
        dtype: of the weights; default as saved.

    Raises:
        ConfigError: it cannot be loaded, or is no TNL model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    import tnl.model

    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: cannot be loaded: {str(error).splitlines()[0]}") from None
    if not isinstance(config, tnl.model.TransnormerConfig):
        raise ConfigError(f"{name}: model_type {config.model_type!r}, expected transnormer")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto")
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: cannot be loaded: {str(error).splitlines()[0]}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), tokenizer
