"""Files and values of configurations as YAML: numbers are numbers, and no file is a traceback or fills the memory."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tnl import config
from tnl.errors import ConfigError
from tnl.plain_yaml import MAX_DEPTH, read_yaml, read_yaml_text

ROOT = Path(__file__).parent.parent


def file_refusal(file: Path) -> str:
    """The one-line message that reading a file is refused with; it begins with the name of the file."""
    with pytest.raises(ConfigError) as caught:
        read_yaml(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    return message.removeprefix(f"{file}: ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2e-3", 2e-3),
        ("2E-3", 2e-3),
        ("1.5e-4", 1.5e-4),
        ("1.e+2", 100.0),
        (".5", 0.5),
        ("3", 3),
        ("-1_000", -1000),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("[1, 2e-3]", [1, 2e-3]),
        ("{a: 1e5}", {"a": 1e5}),
        ("'1e-4'", "1e-4"),
        ("hello", "hello"),
        # Text in YAML 1.2, though not in 1.1.
        ("yes", "yes"),
        ("off", "off"),
        ("010", "010"),
        ("0x10", "0x10"),
        ("12:30", "12:30"),
        ("2026-13-45", "2026-13-45"),
        ("1e", "1e"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_values_of_overrides_are_yaml(text, value):
    parsed = config.parse_overrides([f"a.b={text}"])
    assert parsed == {"a": {"b": value}}
    assert type(parsed["a"]["b"]) is type(value)
    assert read_yaml_text(f"x: {text}") == {"x": value}


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
HOSTILE = {
    "empty": (b"", "expected 'key: value' lines, found nothing"),
    "comment": (b"# nothing\n", "expected 'key: value' lines, found nothing"),
    "scalar": (b"hello\n", "expected 'key: value' lines, found a single value"),
    "number": (b"3\n", "expected 'key: value' lines, found a single value"),
    "list": (b"- a\n- b\n", "expected 'key: value' lines, found a list"),
    "duplicate": (b"seed: 1\noutput: x\nseed: 2\n", "not a valid YAML text: line 3: the key 'seed' is given twice"),
    "nested duplicate": (
        b"train:\n  steps: 1\n  steps: 1\n",
        "not a valid YAML text: line 3: the key 'steps' is given twice",
    ),
    "tab": (b"train:\n\tsteps: 1\n", r"not a valid YAML text: line 2: .*'\\t' that cannot start any token"),
    "binary": (b"\xff\xfe\x00\x01", "not UTF-8 at byte 0; save it as UTF-8"),
    "latin-1": ("output: caf\u00e9\n".encode("latin-1"), "not UTF-8 at byte 11; save it as UTF-8"),
    "nul": (b"output: a\0b\n", "not a valid YAML text: .*special characters are not allowed"),
    "escaped nul": (b'output: "a\\0b"\n', "not a valid YAML text: line 1: a control character in a value"),
    "surrogate": (b'output: "\\ud800"\n', "not a valid YAML text: line 1: a control character in a value"),
    "unclosed": (b"train: {steps: 1\n", "not a valid YAML text: line 2: "),
    "two documents": (b"a: 1\n---\nb: 2\n", "not a valid YAML text: line 2: .*another document"),
    "number as key": (b"1: x\n", "not a valid YAML text: line 1: the key 1 is not text"),
    "list as key": (b"? [a, b]\n: x\n", "not a valid YAML text: line 1: the key a list is not text"),
    "python tag": (b"a: !!python/object/apply:os.system [echo x]\n", r"not a valid YAML text: line 1: tags \(!\)"),
    "function tag": (b"a: !function x.y\n", r"not a valid YAML text: line 1: tags \(!\)"),
    "broken timestamp tag": (b"a: !!timestamp x\n", r"not a valid YAML text: line 1: tags \(!\)"),
    "merge key": (
        b"a: &a {x: 1}\nb: {<<: *a}\n",
        "not a valid YAML text: line 2: anchors and aliases are not supported",
    ),
    "billion laughs": (LAUGHS.encode(), "not a valid YAML text: line 2: anchors and aliases are not supported"),
    "recursive alias": (b"a: &a [*a]\n", "not a valid YAML text: line 1: anchors and aliases are not supported"),
    "deep flow": (b"a: " + b"[" * 10_000, f"not a valid YAML text: line 1: nested deeper than {MAX_DEPTH} levels"),
    "deep map": (b"{a: " * 10_000, f"not a valid YAML text: line 1: nested deeper than {MAX_DEPTH} levels"),
    "deep list": (b"- " * 10_000, f"not a valid YAML text: line 1: nested deeper than {MAX_DEPTH} levels"),
    "many values": (b"a: [" + b"0," * 100_000 + b"]", "not a valid YAML text: line 1: more than 20000 values"),
    "two megabytes": (b"a: " + b"x" * 2_000_000, "larger than 1,000,000 bytes, this is no configuration"),
    "two megabytes of comments": (b"# x\n" * 500_000, "larger than 1,000,000 bytes, this is no configuration"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_broken_file_is_one_error_that_names_it(name, tmp_path):
    data, expected = HOSTILE[name]
    file = tmp_path / "run.yaml"
    file.write_bytes(data)
    assert re.match(expected, file_refusal(file))


def test_deep_overrides_are_refused():
    with pytest.raises(ConfigError, match=r"an override is section\.key=value"):
        config.parse_overrides(["a." * 10_000 + "b=1"])
    with pytest.raises(ConfigError, match=f"nested deeper than {MAX_DEPTH} levels"):
        config.parse_overrides(["deepspeed=" + "[" * 10_000])


def test_memory_is_bounded(tmp_path):
    for i, (data, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"{i}.yaml").write_bytes(data)
    # In a process of its own: the peak of this one is that of all tests before.
    program = r"""
import re, sys
from pathlib import Path
from tnl.errors import ConfigError
from tnl.plain_yaml import read_yaml
refused = 0
for file in Path(sys.argv[1]).iterdir():
    try:
        read_yaml(file)
    except ConfigError:
        refused += 1
print(refused, re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    refused, kibibytes = map(int, done.stdout.split())
    assert refused == len(HOSTILE)
    assert kibibytes < 100 * 1024


def test_an_unreadable_file(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text("a: 1\n")

    def read_text(self, encoding):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", read_text)
    assert file_refusal(file) == "cannot be read: Permission denied"
