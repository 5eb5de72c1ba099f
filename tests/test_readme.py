"""The README's figures are the stored measurement, and its commands are ones that the program takes."""

import json
import os
import re
import subprocess
import sys

from tests.checkout import ROOT, python_path
from tests.released_layout import hub_cache, released_model, write_released
from tnl.config import find_config

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_shows_the_stored_measurement():
    figures = json.loads((ROOT / "tests/golden/quickstart_cpu.json").read_text(encoding="utf-8"))
    for name, key in {"TNL": "tnl", "trigram": "trigram", "bigram": "bigram"}.items():
        rows = (line for line in README.splitlines() if line.startswith(("| TNL,", "| interpolated")))
        (row,) = (line for line in rows if name in line)
        for unit in ("nats", "bits_per_token", "bits_per_byte"):
            assert f"{figures[key][unit]:.4f}" in row, (name, unit)


def test_every_command_names_what_exists():
    commands = re.findall(r"^(?:torchrun .* -m )?tnl (.*?)(?:\s{2,}#.*)?$", README, flags=re.MULTILINE)
    assert len(commands) >= 7
    for command in commands:
        words = command.split()
        name = words[1] if words[0] == "data" else words[0]
        assert name in (
            "prepare",
            "pretrain",
            "evaluate",
            "generate",
            "compare",
            "report",
            "export",
            "doctor",
            "chat",
            "convert",
            "bench",
            "plan",
            "status",
        ), command
        if name in ("prepare", "pretrain", "plan"):
            assert find_config(words[2] if words[0] == "data" else words[1]).is_file()
    for script in re.findall(r"bash (scripts/[a-z_/]+\.sh)", README):
        assert (ROOT / script).is_file()


def test_the_section_on_released_checkpoints_runs_as_it_stands(tmp_path):
    section = README.partition("## Use a released checkpoint\n")[2].partition("\n## ")[0]
    (use, adapt), (commands,) = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "bash"))
    weights = released_model().state_dict()
    name = re.search(r'"(OpenNLPLab/[^"]+)"', use)[1]
    for folder in ("download", name.partition("/")[2]):
        (tmp_path / folder).mkdir()
        write_released(tmp_path / folder, weights, num_shards=2)
    hub_cache(tmp_path / "download", tmp_path / "hub", name)
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 50)
    program = [use, adapt, "import shlex, sys", "from tnl import cli"]
    lines = [line.partition("  #")[0] for line in commands.splitlines()]
    assert {line.split()[1] for line in lines} == {"generate", "chat", "convert"}
    for line in lines:
        program += [f"sys.argv = shlex.split({line!r})", "print('$', *sys.argv)", "cli.app(standalone_mode=False)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path()},
        input="Hello\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("$ tnl") == len(lines)
    assert not (tmp_path / "canary").exists()
    assert (tmp_path / "TransNormerLLM-1B-safe/model.safetensors").is_file()
