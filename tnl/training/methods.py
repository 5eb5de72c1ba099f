"""What of a loaded model trains: all of it, some parameters, or adapters."""

from fnmatch import fnmatchcase

import torch
from transformers import PreTrainedModel

from tnl.errors import ConfigError
from tnl.model.configuration import TransnormerConfig
from tnl.training.finetune_settings import FullMethod, LoraMethod
from tnl.training.neftune import add_noise


def trains_all(method: FullMethod | LoraMethod) -> bool:
    """Whether every parameter trains, so that a checkpoint alone holds the model."""
    return method.kind == "full" and method.train_only is None


def lora_of(method: LoraMethod, config: TransnormerConfig):
    """peft's configuration of the adapters.

    Raises:
        ConfigError: peft is not installed, or a target cannot have LoRA.
    """
    try:
        from tnl.model.adapters import lora_config, lora_targets
    except ModuleNotFoundError:
        raise ConfigError("method.kind: lora needs peft; install it: pip install 'transnormer-llm[finetune]'") from None
    try:
        return lora_config(
            config,
            r=method.rank,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            target_modules=method.targets or lora_targets(config),
            use_rslora=method.rslora,
            use_dora=method.dora,
        )
    except ValueError as error:
        raise ConfigError(str(error).replace("target_modules", "method.targets", 1)) from None


def check_method(method: FullMethod | LoraMethod, config: TransnormerConfig) -> None:
    """Refuse what the model has not or cannot have, before anything is loaded.

    Raises:
        ConfigError: names it.
    """
    from tnl.model.modeling import TransnormerForCausalLM

    with torch.device("meta"):
        model = TransnormerForCausalLM(config)
    if method.kind == "full":
        _freeze(model, method.train_only)
        return
    lora = lora_of(method, config)
    from tnl.model.adapters import check_targets
    from tnl.model.four_bit import check_four_bits

    try:
        check_targets(model, method.targets or [])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        if method.base_bits == 4:
            check_four_bits(model, lora.target_modules)
    except ValueError as error:
        raise ConfigError(f"method.base_bits: {error}") from None


def apply_method(method: FullMethod | LoraMethod, model: PreTrainedModel, device: torch.device) -> None:
    """Freeze what does not train, add adapters and noise; of a checked method, before the engine is built.

    ``device``: where the model will be.
    """
    if method.kind == "full":
        _freeze(model, method.train_only)
    else:
        config = lora_of(method, model.config)
        from tnl.model.adapters import ADAPTED, add_adapters

        add_adapters(model, config)
        if method.base_bits == 4:
            from tnl.model.four_bit import to_four_bits

            to_four_bits(model, [ADAPTED], device)
    if method.neftune_alpha is not None:
        add_noise(model, method.neftune_alpha)
    if not trains_all(method):
        model.register_state_dict_post_hook(_leave_out_frozen)


def _freeze(model: PreTrainedModel, train_only: list[str] | None) -> None:
    if train_only is None:
        return
    names = [name for name, _ in model.named_parameters()]
    unknown = [pattern for pattern in train_only if not any(fnmatchcase(name, pattern) for name in names)]
    if unknown:
        raise ConfigError(
            f"method.train_only: no parameter has a name like {', '.join(unknown)}; names are like {names[0]}, "
            f"{names[1]}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in train_only))


def _leave_out_frozen(model: PreTrainedModel, state: dict, prefix: str, metadata: dict) -> None:
    """Checkpoints hold what trains; the rest is that of the base. A tied head has a second name."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)
