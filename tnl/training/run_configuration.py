"""A run's configuration with the model section of the checkpoint that it begins from.

Nothing heavy is imported where there is none, so that a mistake is told at once.
"""

import os
from pathlib import Path
from typing import TypeVar

from tnl import config as configuration
from tnl.errors import ConfigError
from tnl.model.settings import ModelSettings
from tnl.training.settings import RunSettings

SettingsT = TypeVar("SettingsT", bound=RunSettings)


def load_settings(
    kind: type[SettingsT], name: str | Path, overrides: list[str] | None = None, values: dict | None = None
) -> SettingsT:
    """As `tnl.config.load`; with ``init_from`` the model section is that of the checkpoint.

    Raises:
        ConfigError: also where the section gives a value that is not the checkpoint's. A greater ``vocab_size``
            extends the vocabulary. A configuration of tuning where one of pretraining is wanted.
    """
    tree, source = configuration.read(name, overrides, values)
    if "method" in tree and "method" not in kind.model_fields:
        raise ConfigError(
            f"{source}: has a method section, so it is for tnl finetune; give tnl pretrain and tnl plan a "
            "configuration of pretraining (with the same model and train sections its plan is that of method.kind full)"
        )
    base = tree.get("init_from")
    if isinstance(base, str):
        from tnl.training.base_checkpoint import base_config

        section = tree.get("model")
        given = section if isinstance(section, dict) else {}
        found = ModelSettings.describing(base_config(os.path.expanduser(base))).model_dump(mode="json")
        problems = model_differences(given, found, base)
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            raise ConfigError(f"{source}: {count}\n" + "\n".join(f"  {line}" for line in problems))
        tree = tree | {"model": found | given}
    return configuration.validate(kind, tree, source)


def model_differences(given: dict, found: dict, name: str) -> list[str]:
    """Problems of a model section ``given`` beside the checkpoint ``name``, whose own is ``found``."""
    problems = []
    for key, value in given.items():
        if key not in found or key == "preset":
            continue
        same = value == found[key] or (isinstance(value, list | tuple) and list(value) == list(found[key]))
        is_greater = key == "vocab_size" and isinstance(value, int) and value > found[key]
        if not same and not is_greater:
            more = " or a greater number, which extends the vocabulary," if key == "vocab_size" else ""
            problems.append(
                f"model.{key}: {value!r}, but init_from {name} has {found[key]!r}; set that{more} or remove it"
            )
    return problems
