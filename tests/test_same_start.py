"""Ranks that were started differently: all stop before the run begins, and one message says who and what."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.test_processes import torchrun
from tests.tiny_corpus import tiny_shards
from tests.tiny_run import tiny_run, tiny_tree
from tnl.training.engine import Ranks
from tnl.training.same_start import check_same_start, start_facts

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Folder and output of a start in which rank 1 has another learning rate and another source file."""
    folder = tmp_path_factory.mktemp("start")
    leave = shutil.ignore_patterns("__pycache__")
    for package in ("tnl", "kernels/tnl_kernels", "configs"):
        shutil.copytree(ROOT / package, folder / "checkout" / package, ignore=leave)
    with (folder / "checkout/tnl/training/schedule.py").open("a") as source:
        source.write("# a later version\n")
    tree = tiny_tree(tiny_shards(folder, heldout_fraction=0.1), folder / "run")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    worker = [ROOT / "tests/start_worker.py", folder / "checkout", folder / "tiny.yaml", folder / "run"]
    return folder, torchrun(*map(str, worker))


def test_one_message_names_the_rank_and_what_differs(stopped):
    _, done = stopped
    assert done.stderr.count("start every rank with the same command, packages and checkout") == 1
    assert "rank 1: started with another configuration or code than rank 0" in done.stderr
    lines = done.stderr.splitlines()
    assert "  configuration optimizer.lr: 0.003 on rank 0, 0.004 on rank 1" in lines
    (file,) = [line for line in lines if line.startswith("  file ")]
    assert file.startswith("  file tnl/training/schedule.py: ")
    assert not [line for line in lines if line.startswith("  package ")]
    assert done.stderr.count("see the message of rank 0") == 1


def test_all_ranks_end_with_the_code_of_bad_usage(stopped):
    folder, _ = stopped
    assert [(folder / f"run.{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    assert not (folder / "run").exists()


def test_the_facts_cover_configuration_packages_and_sources(tmp_path):
    facts = start_facts(tiny_run(tmp_path, tmp_path / "run", "model.kind=llama"))
    assert facts["configuration model.kind"] == json.dumps("llama")
    assert facts["package torch"]
    assert {"file tnl/cli.py", "file tnl/training/same_start.py", "file tnl_kernels/dispatch.py"} <= facts.keys()
    other = start_facts(tiny_run(tmp_path, tmp_path / "run"))
    assert [key for key in facts if facts[key] != other[key]] == ["configuration model.kind"]


def test_a_single_process_has_nobody_to_differ_from(tmp_path):
    check_same_start(tiny_run(tmp_path, tmp_path / "run"), Ranks(0, 1, torch.device("cpu")))
