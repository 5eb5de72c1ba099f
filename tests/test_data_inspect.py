"""`tnl data inspect`: examples, what is learned of them, and how full sequences are, before anything is trained."""

import io
import json
import re

import pytest
from rich.console import Console

from tests.tiny_folder import tiny_folder
from tests.tiny_tuning import tuning
from tnl import config
from tnl.errors import EXIT_DATA
from tnl.tools.data_inspect import inspect_data

VOCAB = 340


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base"))


def settings(folder, base, records, **data):
    file = folder / "data.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    source = {"kind": "json", "path": str(file)} | data.pop("source", {})
    values = json.dumps({"heldout_fraction": 0, "source": source} | data)
    return tuning(
        base, folder / "run", {"kind": "full"}, f"data={values}", "train.sequence_length=32", vocab_size=VOCAB
    )


def test_the_command_shows_template_examples_and_statistics(tmp_path, base, tnl_command):
    records = [{"prompt": "def value", "completion": "in range"} for _ in range(20)]
    found = settings(tmp_path, base, [*records, {"prompt": "self " * 99, "completion": "x"}])
    (tmp_path / "run.yaml").write_text(config.dump(found))
    code, out, _ = tnl_command("data", "inspect", tmp_path / "run.yaml", "--examples", "2")
    assert code == 0
    assert "template reference:" in out
    assert out.count("Human:\\ndef value\\nAssistant:\\n") == 2
    assert out.count("in range</s>") == 2
    assert "records: 21 read, 0 bad" in out
    assert "train: 20 examples" in out
    assert "1 without an answer left" in out
    assert "packed: " in out
    assert not (tmp_path / "run").exists()
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"')
    code, _, error = tnl_command("data", "inspect", tmp_path / "run.yaml")
    assert code == EXIT_DATA
    assert error.startswith(f"error: {tmp_path}/data.jsonl:1: ")


def test_learned_tokens_have_a_colour_of_their_own_and_data_cannot_command_a_terminal(tmp_path, base):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="standard", soft_wrap=True, highlight=False)
    records = [{"prompt": "\u001b[2Jdef [red]", "completion": "value"}, "{}"]
    found = settings(tmp_path, base, records, source={"on_bad": "skip", "max_bad_fraction": 0.5})
    inspect_data(found, 1, console)
    out = stream.getvalue()
    assert "\x1b[2J" not in out
    assert "def [red]" in re.sub(r"\x1b\[[0-9;]*m", "", out)
    learned = next(line for line in out.splitlines() if "learned" in line and "</s>" in line)
    assert "\x1b[1;32m" in learned
    read = next(line for line in out.splitlines() if "read  " in line)
    assert "\x1b[1;32m" not in read
    assert "1 read, 1 bad" in out
    assert f"skipped: {tmp_path}/data.jsonl:2: " in out
