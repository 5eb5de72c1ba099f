"""The README's figures are the stored measurement, and its commands are ones that the program takes."""

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.checkout import ROOT
from tests.released_layout import hub_cache, released_model, write_released
from tests.task_files import write_paper
from tests.test_processes import environment
from tests.tiny_folder import tiny_folder
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
            "inspect",
            "pretrain",
            "finetune",
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
            "fetch",
        ), command
        if name in ("prepare", "inspect", "pretrain", "finetune", "plan"):
            assert find_config(words[2] if words[0] == "data" else words[1]).is_file()
    for script in re.findall(r"bash (scripts/[a-z_/]+\.sh)", README):
        assert (ROOT / script).is_file()


def test_pages_that_are_linked_exist():
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


def section(title: str) -> str:
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


def released_on_the_hub(folder: Path, name: str) -> None:
    """A tiny released checkpoint in the hub cache of `run_as_it_stands`, as if it had been downloaded."""
    (folder / "download").mkdir()
    write_released(folder / "download", released_model().state_dict(), num_shards=2)
    hub_cache(folder / "download", folder / "hub", name)


def run_as_it_stands(text: str, folder: Path) -> tuple[list[list[str]], str]:
    """Run the Python and the tnl commands of a section in one process, in their order, "Hello" on the standard input.

    Returns the commands, and what was printed.
    """
    program, commands = ["import shlex, sys", "from tnl import cli"], []
    for kind, block in re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL):
        if kind == "python":
            program.append(block)
            continue
        for line in (line.partition("  #")[0].strip() for line in block.splitlines()):
            if line.startswith("tnl "):
                commands.append(line.split())
                program += [f"sys.argv = shlex.split({line!r})", "print('$', *sys.argv)"]
                program.append("cli.app(standalone_mode=False)")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        cwd=folder,
        env=environment(HF_HUB_CACHE=str(folder / "hub"), HF_HUB_OFFLINE="1"),
        input="Hello\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("$ tnl") == len(commands)
    assert not (folder / "canary").exists()
    return commands, done.stdout


def test_the_section_on_released_checkpoints_runs_as_it_stands(tmp_path):
    text = section("Use a released checkpoint")
    name = re.search(r'"(OpenNLPLab/[^"]+)"', text)[1]
    released_on_the_hub(tmp_path, name)
    (tmp_path / name.partition("/")[2]).mkdir()
    write_released(tmp_path / name.partition("/")[2], released_model().state_dict(), num_shards=2)
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 50)
    commands, _ = run_as_it_stands(text, tmp_path)
    assert {words[1] for words in commands} == {"generate", "chat", "convert"}
    assert (tmp_path / "TransNormerLLM-1B-safe/model.safetensors").is_file()


def test_the_section_on_fine_tuning_runs_as_it_stands(tmp_path):
    released_on_the_hub(tmp_path, "OpenNLPLab/TransNormerLLM-1B")
    records = [{"instruction": f"count from {i}", "output": f"{i} {i + 1} {i + 2}"} for i in range(100)]
    (tmp_path / "my.json").write_text(json.dumps(records))
    commands, printed = run_as_it_stands(section("Fine-tune it"), tmp_path)
    assert [words[1] for words in commands] == ["data", "finetune", "chat", "export", "export", "finetune", "finetune"]
    assert "learned tokens are green" in printed
    assert (tmp_path / "my-adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "my-model/model.safetensors").is_file()
    for run in ("alpaca-1b-lora", "alpaca-1b-full", "alpaca-1b-4bit"):
        assert (tmp_path / "runs" / run / "samples.jsonl").is_file()


def test_the_section_on_evaluation_runs_as_it_stands(tmp_path):
    tiny_folder(tmp_path).rename(tmp_path / "my-model")
    write_paper(tmp_path / "tasks")
    commands, printed = run_as_it_stands(section("Evaluate it"), tmp_path)
    assert [words[1] for words in commands] == ["evaluate", "data", "evaluate", "evaluate"]
    found = json.loads((tmp_path / "evaluation/my-model-paper/scores.json").read_text())
    ours, *published = found["tables"][0]["rows"]
    assert [column for column in found["tables"][0]["columns"] if column in ours["cells"]] == found["tables"][0][
        "columns"
    ]
    assert not any(cell["note"] for cell in ours["cells"].values())
    assert len(published) == 29
    assert "TNL-15B" in printed
    assert found["scores"]["mmlu"][0]["num_parts"] == 57
    assert found["scores"]["mmlu"][0]["num_fewshot"] == 5
