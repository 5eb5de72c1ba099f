"""The README's figures are the stored measurement, and its commands are ones that the program takes."""

import json
import re
from pathlib import Path

from tnl.config import find_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_shows_the_stored_measurement():
    figures = json.loads((ROOT / "tests/golden/quickstart_cpu.json").read_text(encoding="utf-8"))
    for name, key in {"TNL": "tnl", "trigram": "trigram", "bigram": "bigram"}.items():
        (row,) = (line for line in README.splitlines() if line.startswith("| ") and name in line and "nats" not in line)
        for unit in ("nats", "bits_per_token", "bits_per_byte"):
            assert f"{figures[key][unit]:.4f}" in row, (name, unit)


def test_every_command_names_what_exists():
    commands = re.findall(r"^(?:torchrun .* -m )?tnl (.*?)(?:\s{2,}#.*)?$", README, flags=re.MULTILINE)
    assert len(commands) >= 7
    for command in commands:
        words = command.split()
        name = words[1] if words[0] == "data" else words[0]
        assert name in ("prepare", "pretrain", "evaluate", "generate", "report", "export", "doctor"), command
        if name in ("prepare", "pretrain"):
            assert find_config(words[2] if words[0] == "data" else words[1]).is_file()
    for script in re.findall(r"bash (scripts/[a-z_/]+\.sh)", README):
        assert (ROOT / script).is_file()
