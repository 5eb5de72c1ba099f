"""YAML and dotted overrides -> one validated configuration, or one message that lists every problem.

Order of precedence: default < model preset < YAML < ``section.key=value`` on the command line.
"""

import difflib
import json
import re
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tnl.errors import ConfigError
from tnl.settings import Settings

MAX_FILE_BYTES = 1_000_000
MAX_NODES = 20_000
# A key file, not a configuration, is the place of a secret: the effective configuration is copied beside every
# checkpoint.
SECRET = re.compile(r"(api_?key|secret|password|access_token|auth_token)$", re.IGNORECASE)

SettingsT = TypeVar("SettingsT", bound=Settings)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and expanding aliases, and reads 1e-4 as a number (YAML 1.1 reads it as
    text)."""

    def __init__(self, stream):
        super().__init__(stream)
        self.num_nodes = 0

    def compose_node(self, parent, index):
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES} values")
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"line {mark.line + 1}: anchors and aliases are not supported, write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key {name!r} is not text")
            if name in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key '{name}' is given twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def find_config(name: str | Path, folder: str = "") -> Path:
    """Path of a configuration file: as given, or a name under the shipped ``configs`` (``pretrain/quickstart``,
    ``tnl-1b``).

    Raises:
        ConfigError: there is no such file; the shipped names are listed.
    """
    given = Path(name)
    if given.is_file():
        return given
    package = Path(__file__).resolve().parent
    shipped = package / "presets" if (package / "presets").is_dir() else package.parent / "configs"
    relative = f"{name}".removeprefix("configs/").removesuffix(".yaml") + ".yaml"
    candidate = shipped / folder / relative
    if candidate.is_file() and candidate.resolve().is_relative_to(shipped):
        return candidate
    known = sorted(str(p.relative_to(shipped / folder).with_suffix("")) for p in (shipped / folder).rglob("*.yaml"))
    raise ConfigError(f"{name}: no such file; give a path, or one of the shipped names: {', '.join(known)}")


def read_yaml_text(text: str):
    """The value of YAML text; raises ``yaml.YAMLError``."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file.

    Raises:
        ConfigError: not readable, not YAML, not a mapping; the message names the file and line.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes, this is no configuration")
        value = read_yaml_text(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path}: not a valid YAML file: {text}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, found {type(value).__name__}")
    return value


def _merge(base: dict, over: dict) -> dict:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def parse_overrides(overrides: list[str]) -> dict:
    """``["train.steps=10", "optimizer.lr=1e-3"]`` -> nested mapping; values are read as YAML.

    Raises:
        ConfigError: an override without ``=``, or whose value is not YAML.
    """
    merged: dict = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key or not all(key.split(".")):
            raise ConfigError(f"{text}: an override is section.key=value, as in train.steps=100")
        try:
            parsed = read_yaml_text(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{text}: the value is not valid YAML: {' '.join(str(error).split())}") from None
        for part in reversed(key.split(".")):
            parsed = {part: parsed}
        merged = _merge(merged, parsed)
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
    """The section that holds the last part of an error's location, and the dotted path without pydantic's union tags.
    The section that holds the last part of an error's location, and the dotted path without pydantic's union tags."""
    section, path, options = model, [], []
    for part in location:
        tagged = [o for o in options if part in _tags(o)]
        if len(options) > 1 and tagged:
            section, options = tagged[0], []
            continue
        if options:
            section = options[0]
        path.append(str(part))
        field = section.model_fields.get(part) if section and isinstance(part, str) else None
        options = _sections(field.annotation) if field else []
        if field is None and part != location[-1]:
            section = None
    return section, path


def _describe(model: type[BaseModel], error: dict) -> str:
    section, path = _locate(model, error["loc"])
    where = ".".join(path)
    if error["type"] == "extra_forbidden":
        names = list(section.model_fields) if section else []
        close = difflib.get_close_matches(path[-1], names, n=1, cutoff=0.5)
        cure = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(names)}"
        return f"{where}: unknown key, {cure}"
    if error["type"] == "missing":
        return f"{where}: missing, this key must be given"
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        return f"{where}.{text}" if where else text
    given = error["input"]
    shown = repr(given) if isinstance(given, str | int | float | bool | type(None)) else type(given).__name__
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, got {shown[:80]}"


def _secrets(tree: dict, path: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        where = f"{path}{key}"
        if SECRET.search(str(key)):
            found.append(f"{where}: a secret does not belong in a configuration, set it in the environment instead")
        if isinstance(value, dict):
            found += _secrets(value, where + ".")
    return found


def validate(model: type[SettingsT], tree: dict, source: str) -> SettingsT:
    """``tree`` as ``model``; ``source`` is the name that error messages begin with.

    Raises:
        ConfigError: every problem at once, each with its dotted path and cure.
    """
    problems = _secrets(tree)
    try:
        # Strict validation of JSON takes a list for a tuple and text for a path, and guesses nothing else.
        settings = model.model_validate_json(json.dumps(tree, default=str)) if not problems else None
    except ValidationError as error:
        problems += [_describe(model, item) for item in error.errors()]
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError(f"{source}: {count}\n" + "\n".join(f"  {line}" for line in problems))
    return settings


def load(model: type[SettingsT], path: str | Path, overrides: list[str] | None = None) -> SettingsT:
    """Read, merge and validate a configuration file.

    A ``model.preset`` key is replaced by the values of that file under ``configs/model``.

    Raises:
        ConfigError: see `find_config`, `read_yaml`, `parse_overrides`, `validate`.
    """
    file = find_config(path)
    tree = _merge(read_yaml(file), parse_overrides(overrides or []))
    section = tree.get("model")
    if isinstance(section, dict) and isinstance(section.get("preset"), str):
        tree["model"] = _merge(read_yaml(find_config(section["preset"], "model")), section)
    return validate(model, tree, str(file))


def dump(settings: Settings) -> str:
    """The effective configuration as YAML text."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
