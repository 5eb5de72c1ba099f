"""The wheel holds the program, its kernels and its configurations, works where it is unpacked, and holds no more."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tnl

ROOT = Path(__file__).parent.parent
PACKED = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "tnl", "kernels", "configs", "tests"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: setuptools writes build folders beside setup.py."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in PACKED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, source],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_program_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"transnormer_llm-{tnl.__version__}.dist-info"
    expected = {file.relative_to(ROOT).as_posix() for file in (ROOT / "tnl").rglob("*.py")}
    expected |= {file.relative_to(ROOT / "kernels").as_posix() for file in (ROOT / "kernels/tnl_kernels").rglob("*.py")}
    presets = {file.relative_to(ROOT / "configs").as_posix() for file in (ROOT / "configs").rglob("*.yaml")}
    assert presets
    expected |= {f"tnl/presets/{name}" for name in presets}
    assert {name for name in names if not name.startswith(info)} == expected
    assert f"{info}/licenses/LICENSE" in names


def test_metadata(unpacked):
    (info,) = unpacked.glob("*.dist-info")
    scripts = configparser.ConfigParser()
    scripts.read(info / "entry_points.txt")
    assert dict(scripts["console_scripts"]) == {"tnl": "tnl.cli:main"}
    metadata = (info / "METADATA").read_text(encoding="utf-8").splitlines()
    assert "Name: transnormer-llm" in metadata
    assert f"Version: {tnl.__version__}" in metadata
    assert "License-Expression: Apache-2.0" in metadata or "License: Apache-2.0" in metadata
    assert "Requires-Dist: torch>=2.11" in metadata


def test_shipped_names_resolve_in_an_unpacked_wheel(unpacked, tmp_path):
    program = """
import json
from tnl import cli, config
from tnl.plain_yaml import read_yaml
import importlib.util
names = json.loads(input())
print(json.dumps({
    "tnl": cli.__file__,
    "kernels": importlib.util.find_spec("tnl_kernels").origin,
    "found": {name: str(config.find_config(name)) for name in names},
    "preset": config._read_preset("tnl-1b", "run.yaml") == read_yaml(config.find_config("model/tnl-1b")),
}))
"""
    names = ["pretrain/quickstart"]
    names += [str(file.relative_to(ROOT / "configs").with_suffix("")) for file in (ROOT / "configs").rglob("*.yaml")]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(unpacked), os.environ.get("PYTHONPATH", "")])},
        input=json.dumps(names),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert answer["tnl"] == str(unpacked / "tnl/cli.py")
    assert answer["kernels"] == str(unpacked / "tnl_kernels/__init__.py")
    assert answer["found"] == {name: str(unpacked / "tnl/presets" / f"{name}.yaml") for name in names}
    assert answer["preset"]
