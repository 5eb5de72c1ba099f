"""YAML and dotted overrides -> one validated configuration, or one message that lists every problem.

Order of precedence: default < model preset < YAML < ``section.key=value`` on the command line.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tnl.errors import ConfigError, did_you_mean, plain_name
from tnl.plain_yaml import MAX_DEPTH, SHOWN_CHARACTERS, read_yaml, read_yaml_text, show, write_yaml_text
from tnl.settings import Settings

# The environment, not a configuration, is the place of a secret: the effective configuration is copied beside every
# checkpoint.
SECRET = re.compile(
    r"((api|access|auth|private|secret)[-_]?key|secret|passw(or)?d|passphrase|credentials?"
    r"|(^|access|api|auth|bearer|hf|hub|wandb)[-_]?token)$",
    re.IGNORECASE,
)
# How the text of our own checks begins when it names the key at fault.
KEY_FIRST = re.compile(r"\S+: ")

SettingsT = TypeVar("SettingsT", bound=Settings)


def _shipped_folder() -> Path:
    package = Path(__file__).resolve().parent
    return package / "presets" if (package / "presets").is_dir() else package.parent / "configs"


def _find_shipped(name: str, folder: Path) -> Path | None:
    """The file of a name below a folder of shipped configurations; never one outside of it."""
    candidate = folder / (name.removeprefix("configs/").removesuffix(".yaml") + ".yaml")
    return candidate if candidate.resolve().is_relative_to(folder) and candidate.is_file() else None


def _names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


def shipped_names(section: str) -> list[str]:
    """Names of the shipped configurations below ``configs/section``."""
    return _names(_shipped_folder() / section)


def find_config(name: str | Path) -> Path:
    """Path of a configuration file: as given, or a name under the shipped ``configs`` (``pretrain/quickstart``).

    Raises:
        ConfigError: there is no such file; the shipped names are listed.
    """
    shipped = _shipped_folder()
    try:
        found = Path(name) if Path(name).is_file() else _find_shipped(str(name), shipped)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(name)[:SHOWN_CHARACTERS]!r}: cannot be opened: {error.args[-1]}") from None
    if found is None:
        raise ConfigError(
            f"{name}: no such file; give a path, or one of the shipped names: {', '.join(_names(shipped))}"
        )
    return found


def _read_preset(name: str, source: str) -> dict:
    """The values of a shipped model; a configuration cannot reach files elsewhere by it."""
    folder = _shipped_folder() / "model"
    try:
        found = _find_shipped(name, folder)
    except (OSError, ValueError):
        found = None
    if found is None:
        raise ConfigError(
            f"{source}: 1 problem\n  model.preset: no shipped model {show(name)}, {did_you_mean(name, _names(folder))}"
        )
    return read_yaml(found)


def merge(base: dict, over: dict) -> dict:
    """``base`` with the values of ``over``, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_overrides(overrides: list[str]) -> dict:
    """``["train.steps=10", "optimizer.lr=1e-3"]`` -> nested mapping; values are read as YAML.

    Raises:
        ConfigError: an override without ``=``, or whose value is not YAML.
    """
    merged: dict = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.split(".")
        # The value is never shown: it may be a secret.
        if not equals or not all(parts) or len(parts) > MAX_DEPTH:
            raise ConfigError(f"{key[:SHOWN_CHARACTERS]!r}: an override is section.key=value, as in train.steps=100")
        parsed = read_yaml_text(value, key)
        for part in reversed(parts):
            parsed = {part: parsed}
        merged = merge(merged, parsed)
    return merged


def _sections(annotation) -> list[type[BaseModel]]:
    """The configuration sections among the alternatives of a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in getattr(annotation, "__args__", ()) for section in _sections(part)]


def _tags(section: type[BaseModel]) -> tuple:
    """The values of ``kind`` by which a union chooses this section."""
    field = section.model_fields.get("kind")
    return getattr(field.annotation, "__args__", ()) if field else ()


def _locate(model: type[BaseModel], location: tuple) -> tuple[type[BaseModel] | None, list[str]]:
    """The section that holds the last part of an error's location, and the dotted path without pydantic's union
    tags."""
    section, path, options = model, [], []
    for part in location:
        if isinstance(part, int):  # an item of a list of sections
            path.append(str(part))
            continue
        tagged = [o for o in options if part in _tags(o)]
        if len(options) > 1 and tagged:
            section, options = tagged[0], []
            continue
        if options:
            section = options[0]
        path.append(str(part)[:SHOWN_CHARACTERS])
        field = section.model_fields.get(part) if section and isinstance(part, str) else None
        options = _sections(field.annotation) if field else []
        if field is None and part != location[-1]:
            section = None
    return section, path


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _sections(field.annotation):
            yield from _dotted_keys(section, f"{prefix}{name}.")


def _key_cure(model: type[BaseModel], section: type[BaseModel] | None, path: list[str]) -> str:
    """The cure for an unknown key: the section that has it, or the key of this section that is most like it."""
    known, name = list(section.model_fields) if section else [], plain_name(path[-1])
    others = [key for key in dict.fromkeys(_dotted_keys(model)) if key != ".".join(path)]
    elsewhere = [key for key in others if key.split(".")[-1] == name]
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere and name not in known else did_you_mean(name, known)


def _describe(model: type[BaseModel], error: dict) -> list[str]:
    """The lines ``dotted.path: what, cure`` of one error of pydantic."""
    section, path = _locate(model, error["loc"])
    where = ".".join(path)
    kind, context = error["type"], error.get("ctx", {})
    tag_key = context.get("discriminator", "").strip("'")
    if kind == "extra_forbidden":
        return [f"{where}: unknown key, {_key_cure(model, section, path)}"]
    if kind == "missing":
        return [f"{where}: missing, this key must be given"]
    if kind == "union_tag_not_found":
        return [f"{where}.{tag_key}: missing, this key must be given"]
    if kind == "union_tag_invalid":
        return [f"{where}.{tag_key}: must be one of {context['expected_tags']}, got {show(context['tag'])}"]
    if kind == "value_error":
        # Our own checks: one problem a line, and each begins with the key below this section that is at fault.
        lines = str(context["error"]).splitlines()
        return [f"{where}{'.' if KEY_FIRST.match(line) else ': '}{line}" if where else line for line in lines]
    return [f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, got {show(error['input'])}"]


def _secrets(tree: dict | list, path: str = "") -> Iterator[str]:
    """Dotted paths of the keys that look like those of secrets."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        where = f"{path}{key}"
        if SECRET.search(str(key)):
            yield where
        elif isinstance(value, dict | list):
            yield from _secrets(value, f"{where}.")


def validate(model: type[SettingsT], tree: dict, source: str) -> SettingsT:
    """``tree`` as ``model``; ``source`` is the name that error messages begin with.

    Raises:
        ConfigError: every problem at once, each with its dotted path and cure. What sections demand of each other is
            checked when each of them is valid.
    """
    problems = [
        f"{where}: a secret does not belong in a configuration, set it in the environment instead"
        for where in _secrets(tree)
    ]
    settings = None
    try:
        # Strict validation of JSON takes a list for a tuple and text for a path, and guesses nothing else.
        settings = model.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        for item in error.errors():
            if not (item["loc"] and SECRET.search(str(item["loc"][-1]))):
                problems += _describe(model, item)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError(f"{source}: {count}\n" + "\n".join(f"  {line}" for line in problems))
    return settings


def read(path: str | Path, overrides: list[str] | None = None, values: dict | None = None) -> tuple[dict, str]:
    """Read and merge a configuration file: the tree to validate, and the name of its source.

    A ``model.preset`` key is replaced by the values of that file under ``configs/model``. ``values``, a tree as it
    would stand in a YAML file, goes over the file and under the overrides: a program need not write YAML.

    Raises:
        ConfigError: see `find_config`, `read_yaml`, `parse_overrides`.
    """
    file = find_config(path)
    tree = merge(merge(read_yaml(file), values or {}), parse_overrides(overrides or []))
    section = tree.get("model")
    if isinstance(section, dict) and isinstance(section.get("preset"), str):
        tree["model"] = merge(_read_preset(section["preset"], str(file)), section)
    return tree, str(file)


def load(
    model: type[SettingsT], path: str | Path, overrides: list[str] | None = None, values: dict | None = None
) -> SettingsT:
    """`read` and `validate`."""
    return validate(model, *read(path, overrides, values))


def dump(settings: Settings) -> str:
    """The effective configuration as YAML text."""
    return write_yaml_text(settings.model_dump(mode="json"))
