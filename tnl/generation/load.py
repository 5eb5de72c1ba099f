"""Loading a model and its tokenizer for evaluation and generation."""

from pathlib import Path

import torch

from tnl.errors import ConfigError


def load_config(name: str):
    """The `TransnormerConfig` of a model folder or hub name.

    Raises:
        ConfigError: it cannot be loaded, or is that of another kind of model.
    """
    from transformers import AutoConfig

    from tnl.model import TransnormerConfig

    config = _load(AutoConfig, name, "config.json")
    if not isinstance(config, TransnormerConfig):
        raise _no_tnl(name, config)
    return config


def load_tokenizer(name: str):
    """The tokenizer of a model folder or hub name; code that a folder brings is never run.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, name, "the tokenizer")


def _no_tnl(name: str, config) -> ConfigError:
    return ConfigError(f"{name}: model_type {config.model_type!r}, expected transnormer")


def load_model(name: str, *, dtype: torch.dtype | None = None, llama: type | None = None):
    """Model in evaluation mode on the GPU if there is one, and its tokenizer; code that a folder brings is never run.

    Args:
        name: model folder or hub name of a TNL model.
        dtype: of the weights; default as saved.
        llama: class for a LLaMA baseline, where that will do in place of a TNL.

    Raises:
        ConfigError: it cannot be loaded, or is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
    from transformers.utils.logging import disable_progress_bar

    from tnl.model import TransnormerConfig

    disable_progress_bar()
    config = _load(AutoConfig, name, "config.json")
    if isinstance(config, LlamaConfig) and llama is not None:
        model = _load_llama(llama, name, dtype)
    elif isinstance(config, TransnormerConfig):
        model = _load(AutoModelForCausalLM, name, "the weights", dtype=dtype or "auto")
    else:
        raise _no_tnl(name, config)
    tokenizer = load_tokenizer(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


def _load_llama(kind: type, name: str, dtype: torch.dtype | None):
    """As a TNL is loaded: from its folder alone, and every weight must be there."""
    from tnl.model.loading import check_index_files, weight_problems

    try:
        check_index_files(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    model, info = _load(kind, name, "the weights", dtype=dtype or "auto", output_loading_info=True)
    problems = weight_problems(model, info, allow_other_shapes=False)
    if problems:
        raise ConfigError(f"{name}: weights do not fit the configuration; {'; '.join(problems)}; export it again")
    return model


def _load(loader, name: str, part: str, **options):
    """``loader.from_pretrained(name)`` without remote code; ``part`` is what it reads, for the error."""
    # The library and those below it raise a dozen types for one fact: these files cannot be read as a model.
    try:
        return loader.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        reason = kind + str(error).strip().removeprefix(f"{name}: ")
    if "trust_remote_code=True" in reason:
        raise ConfigError(
            f"{name}: {part} cannot be loaded without running code from that folder, which is never done; give a "
            "folder that tnl export or tnl convert wrote"
        )
    reason = reason.splitlines()[0]
    if not Path(name).exists():
        raise ConfigError(
            f"{name}: no such folder here, and {part} of a hub model of that name cannot be loaded: {reason}; correct "
            "the name, or train or export the model first"
        )
    raise ConfigError(f"{name}: {part} cannot be loaded: {reason}; correct it, or export or download the model again")
