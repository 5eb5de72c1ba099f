"""One thread and no network for every test; without a GPU, Triton kernels run in Triton's interpreter."""

import importlib.util
import os
import platform
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Read when a kernel is defined: before the first import of tnl_kernels.
    os.environ["TRITON_INTERPRET"] = "1"

if importlib.util.find_spec("triton") is None and (sys.platform, platform.machine()) != ("linux", "x86_64"):
    # Machines for which setup.py installs no Triton; elsewhere it must be there.
    collect_ignore_glob = [
        "test_*_triton.py",
        "test_attention_gpu.py",
        "test_attention_operators.py",
        "test_cross_entropy.py",
    ]


@pytest.fixture(autouse=True)
def _linear_stays_as_it_is():
    """DeepSpeed replaces it for good when it sets up ZeRO 3, and the replacement does not know quantised weights."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.fixture
def tnl_command(monkeypatch, capsys):
    """Run ``tnl ARGUMENTS`` in this process: (exit code, standard output, standard error)."""
    from tnl import cli

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["tnl", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
