"""Reading and writing the plain YAML of configuration files: no tags, no aliases, no repeated keys, no surprises."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from tnl.errors import ConfigError

MAX_FILE_BYTES = 1_000_000
MAX_NODES = 20_000
MAX_DEPTH = 32
SHOWN_CHARACTERS = 80
# Scalars of YAML 1.2. YAML 1.1, which PyYAML reads, takes 1e-4 for text, 010 for 8, 12:30 for 750 and no for false.
# An integer of more than 19 digits is text here: it fits no tensor, and Python refuses to convert very long ones.
SCALARS = {
    "null": (re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"^[-+]?(0|[1-9][0-9_]{0,18})$"), list("-+0123456789")),
    "float": (
        re.compile(
            r"^([-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
            r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
}


class _Loader(yaml.SafeLoader):
    """Plain YAML 1.2: mappings, lists and scalars. Duplicate keys, aliases and tags are errors."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def __init__(self, stream):
        super().__init__(stream)
        self.num_nodes = 0
        self.depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise _marked(event, f"more than {MAX_NODES} values")
        if self.depth == MAX_DEPTH:
            raise _marked(event, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            raise _marked(event, "anchors and aliases are not supported, write the value out")
        if event.tag is not None:
            raise _marked(event, "tags (!) are not supported, write the value without, or in quotes if it is text")
        # Escapes in quotes bring in what the reader refuses elsewhere.
        if isinstance(event, yaml.ScalarEvent) and self.NON_PRINTABLE.search(event.value):
            raise _marked(event, "a control character in a value")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise _marked(key, f"the key {show(name)} is not text")
            if name in seen:
                raise _marked(key, f"the key '{name[:SHOWN_CHARACTERS]}' is given twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts text in quotes which `_Loader` would read as a number."""


for _tag, (_pattern, _first) in SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


def _marked(place: yaml.Event | yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def _reason(error: yaml.YAMLError) -> str:
    """Line and kind of an error, without the text there: it may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    return f"line {mark.line + 1}: " + ", ".join(part for part in (error.context, error.problem) if part)


def show(value: Any) -> str:
    """A value of the user, as YAML writes it, for a message."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return json.dumps(value)[:SHOWN_CHARACTERS]


def read_yaml_text(text: str, source: str = "text") -> Any:
    """The value of YAML text.

    Raises:
        ConfigError: not YAML; the message begins with ``source`` and names the line, and shows nothing of the text.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not a valid YAML text: {_reason(error)}") from None


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file.

    Raises:
        ConfigError: not readable, not YAML, not a mapping; the message names the file and line.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes, this is no configuration")
        value = read_yaml_text(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(value, dict):
        found = "nothing" if value is None else show(value) if isinstance(value, list) else "a single value"
        raise ConfigError(f"{path}: expected 'key: value' lines, found {found}")
    return value


def write_yaml_text(tree: dict) -> str:
    """YAML text that `read_yaml_text` reads as ``tree``."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
