"""The doctor: a machine that is well passes, a broken kernel is a FAIL row and exit code 69, nothing is a traceback."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import tnl_kernels
import torch
from tnl_kernels import tiles

from tnl import errors
from tnl.tools import doctor_checks, doctor_machine
from tnl.tools.doctor import format_tiles, tile_rows

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="plays a machine without a GPU that works")


@pytest.fixture
def tnl_doctor(tnl_command):
    """Run ``tnl doctor ARGUMENTS`` in this process: (exit code, standard output, standard error)."""
    return partial(tnl_command, "doctor")


@pytest.fixture
def one_case(monkeypatch):
    """Leave the checks of sglu and srmsnorm only."""
    chosen = [case for case in doctor_checks.cases_of("cpu") if case.op in ("sglu", "srmsnorm")]
    monkeypatch.setattr("tnl.tools.doctor.cases_of", lambda device_type: chosen)


def rows_of(out: str) -> dict[str, str]:
    """PASS or FAIL by check."""
    rows = [line.split(None, 1) for line in out.splitlines() if line.startswith(("  PASS", "  FAIL"))]
    return {rest.split("  ")[0]: verdict for verdict, rest in rows}


# A machine that is well


def test_a_cpu_passes(tnl_doctor, tmp_path):
    code, out, err = tnl_doctor("--device", "cpu", "--json", tmp_path / "doctor.json")
    assert (code, err) == (errors.EXIT_OK, "")
    assert out.isascii()
    assert max(map(len, out.splitlines())) < 200
    rows = rows_of(out)
    assert len(rows) == 17
    assert set(rows.values()) == {"PASS"}
    assert "all 17 checks passed on cpu" in out
    for what in ("torch", "triton", "transformers", "deepspeed", "Python", "driver", "CUDA of torch", "Triton cache"):
        assert f"\n  {what} " in out
    figures = json.loads((tmp_path / "doctor.json").read_text())
    assert figures["ok"] is True
    assert figures["device"] == "cpu"
    assert [row["check"] for row in figures["checks"]] == list(rows)
    for row in figures["checks"][:-1]:
        assert 0 <= row["error"] <= row["bound"] == 1e-5
        assert row["repeatable"]


@needs_no_gpu
def test_a_machine_without_a_gpu_says_so(tnl_doctor, one_case, monkeypatch):
    monkeypatch.setattr(doctor_machine.shutil, "which", lambda name: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code, out, _ = tnl_doctor()
    assert code == errors.EXIT_OK
    assert "no GPU that torch or nvidia-smi sees" in out
    assert "attention tiles: none" in out
    assert "checks on cpu\n" in out


@pytest.mark.gpu
def test_a_gpu_passes(tnl_doctor, tmp_path):
    code, out, _ = tnl_doctor("--json", tmp_path / "doctor.json")
    print(out)
    assert code == errors.EXIT_OK
    figures = json.loads((tmp_path / "doctor.json").read_text())
    assert len(figures["tiles"]) == 18
    assert figures["gpus"][0]["name"] in out


def test_every_op_is_checked():
    for device_type in ("cpu", "cuda"):
        cases = doctor_checks.cases_of(device_type)
        assert {case.op for case in cases} == set(tnl_kernels.__all__)
        assert len({case.name for case in cases}) == len(cases)


def test_what_a_gpu_runs_is_right_in_the_torch_forms():
    for case in doctor_checks.cases_of("cuda"):
        row = doctor_checks.check(case, torch.device("cpu"))
        assert row["ok"], row
        assert row["repeatable"], row


# A kernel that is broken


def wrong_gradient(a, b):
    """a * b, with the gradient of b too large by a hundredth."""
    return a * (1.01 * b - 0.01 * b.detach())


def raises(a, b):
    """As Triton does when a tile does not fit."""
    raise RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 101376.\nmore")


BROKEN = {
    "wrong output": (lambda a, b: 1.001 * a * b, "1.0e-03 >  1e-05"),
    "wrong gradient": (wrong_gradient, "1.0e-02 >  1e-05  db"),
    "not finite": (lambda a, b: a * b / (a > -1), "not finite >  1e-05"),
    "raises": (raises, "RuntimeError: out of resource: shared memory, Required: 262144, Hardware limit: 101376.\n"),
    "wrong shape": (lambda a, b: (a * b)[:-1], "ValueError: y: shape (36, 1001), expected (37, 1001)"),
    "two results": (lambda a, b: (a, b), "ValueError: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_reported(name, tnl_doctor, one_case, monkeypatch, tmp_path):
    op, message = BROKEN[name]
    monkeypatch.setattr(tnl_kernels, "sglu", op)
    code, out, err = tnl_doctor("--device", "cpu", "--json", tmp_path / "doctor.json")
    assert (code, err) == (errors.EXIT_MACHINE, "")
    assert code == 69
    assert rows_of(out) == {
        "srmsnorm fp32": "PASS",
        "sglu fp32": "FAIL",
        "two runs of each give the same bits": "PASS",
    }
    assert message in out
    assert "1 of 3 checks FAILED on cpu" in out
    for cure in ("constraints.txt", "rm -r ", "report it"):
        assert cure in out.partition("What to do:")[2]

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    figures = json.loads((tmp_path / "doctor.json").read_text(), parse_constant=refuse)
    assert figures["ok"] is False
    assert [row["ok"] for row in figures["checks"]] == [True, False, True]


def test_runs_that_differ_are_reported(tnl_doctor, one_case, monkeypatch):
    calls = []

    def drifting(a, b):
        calls.append(None)
        return a * b * (1 + 2e-7 * (len(calls) % 2))

    monkeypatch.setattr(tnl_kernels, "sglu", drifting)
    code, out, _ = tnl_doctor("--device", "cpu")
    assert code == errors.EXIT_MACHINE
    assert rows_of(out)["sglu fp32"] == "PASS"
    assert rows_of(out)["two runs of each give the same bits"] == "FAIL"
    assert "these differ: sglu fp32" in out


def test_when_nothing_runs_nothing_is_repeatable(tnl_doctor, one_case, monkeypatch):
    monkeypatch.setattr(tnl_kernels, "sglu", raises)
    monkeypatch.setattr(tnl_kernels, "srmsnorm", lambda x: raises(x, x))
    code, out, _ = tnl_doctor("--device", "cpu")
    assert code == errors.EXIT_MACHINE
    assert set(rows_of(out).values()) == {"FAIL"}


def test_the_message_of_a_compilation_error_has_its_reason():
    error = RuntimeError("at 12:4:\n  b_o = tl.dot(b_q, b_k)\n        ^\nfirst and second dims \u2260\n")
    assert doctor_checks.message_of(error) == "RuntimeError: at 12:4: first and second dims ?"
    assert doctor_checks.message_of(ValueError()) == "ValueError"
    assert len(doctor_checks.message_of(ValueError("x" * 999))) == doctor_checks.MESSAGE_CHARACTERS


# A GPU that does not work


@needs_no_gpu
def test_a_gpu_that_torch_cannot_use_is_a_failure(tnl_doctor, one_case, monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.86.15'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code, out, _ = tnl_doctor()
    assert code == errors.EXIT_MACHINE
    assert rows_of(out)["torch uses the GPU"] == "FAIL"
    assert "NVIDIA H100 80GB HBM3, which torch cannot use" in out
    assert "570.86.15" in out
    code, _, err = tnl_doctor("--device", "cuda")
    assert code == errors.EXIT_USAGE
    assert "NVIDIA H100 80GB HBM3, which torch cannot use" in err
    assert tnl_doctor("--device", "cpu")[0] == errors.EXIT_OK
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert tnl_doctor()[0] == errors.EXIT_OK
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed, because it could not reach the driver'\nexit 9\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert tnl_doctor()[0] == errors.EXIT_OK


@pytest.fixture
def played_gpus(monkeypatch):
    """Two GPUs that have figures and run nothing."""
    card = SimpleNamespace(
        name="NVIDIA A100", major=8, minor=0, total_memory=80 * 2**30, multi_processor_count=108,
        shared_memory_per_block_optin=163 * 2**10,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    caches = [tiles.properties, tiles.attention_tiles, tiles.attention_bwd_tiles]
    for function in caches:
        function.cache_clear()
    yield card
    for function in caches:
        function.cache_clear()


@needs_no_gpu
def test_a_gpu_on_which_nothing_runs_is_reported_row_by_row(tnl_doctor, one_case, played_gpus, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    code, out, err = tnl_doctor("--device", "cuda:1")
    assert (code, err) == (errors.EXIT_MACHINE, "")
    assert "GPU cuda:1" in out
    assert "NVIDIA A100, compute capability 8.0, 80.0 GiB, 108 multiprocessors, 163 KiB of shared memory" in out
    assert out.count("163.0\n") == 18
    rows = rows_of(out)
    assert rows.pop("Triton cache folder is writable") == "PASS"
    assert set(rows.values()) == {"FAIL"}
    assert not (tmp_path / "cache").exists()


@needs_no_gpu
def test_a_gpu_that_does_not_answer_is_a_row_too(tnl_doctor, one_case, played_gpus, monkeypatch):
    def refuse(device):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_properties", refuse)
    code, out, err = tnl_doctor("--device", "cuda")
    assert (code, err) == (errors.EXIT_MACHINE, "")
    assert "RuntimeError: CUDA error: all CUDA-capable devices are busy or unavailable\n" in out


@pytest.mark.parametrize("text", ["gpus", "cuda:", "cuda:x", "cuda:-1", "cpu:1", "mps", "", "CUDA"])
def test_what_is_no_device_is_refused(text, tnl_doctor):
    code, out, err = tnl_doctor("--device", text)
    assert (code, out) == (errors.EXIT_USAGE, "")
    assert err == f"error: --device: {text!r} is no device of this program; give cpu, cuda or cuda:NUMBER\n"


@needs_no_gpu
def test_a_device_that_is_not_there_is_refused(tnl_doctor, request):
    for text in ("cuda", "cuda:1"):
        code, out, err = tnl_doctor("--device", text)
        assert (code, out, err.count("\n")) == (errors.EXIT_USAGE, "", 1)
        assert err.startswith(f"error: --device: {text}, but this machine has no GPU")
    request.getfixturevalue("played_gpus")
    code, out, err = tnl_doctor("--device", "cuda:2")
    assert (code, out) == (errors.EXIT_USAGE, "")
    assert err == "error: --device: cuda:2, but torch sees 2 GPU(s); give one of cuda:0 to cuda:1\n"


# Files, versions, tiles


def test_a_json_file_that_cannot_be_written_is_found_before_the_checks(tnl_doctor, tmp_path):
    for file in (tmp_path / "nowhere" / "doctor.json", tmp_path):
        code, out, err = tnl_doctor("--device", "cpu", "--json", file)
        assert (code, out, err.count("\n")) == (errors.EXIT_CANNOT_WRITE, "", 1)
        assert err.startswith(f"error: {file}: ")


def test_a_cache_folder_that_cannot_be_written_is_a_failure(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    row = doctor_machine.cache_row(doctor_machine.triton_cache())
    assert not row["ok"]
    assert f"{tmp_path / 'file'}: Not a directory; set TRITON_CACHE_DIR" in row["message"]
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert doctor_machine.triton_cache() == {"folder": str(tmp_path / ".triton" / "cache"), "problem": None}
    assert not (tmp_path / ".triton").exists()


def test_the_default_cache_folder_is_that_of_triton(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.delenv("TRITON_HOME", raising=False)
    assert doctor_machine.triton_cache()["folder"] == triton.knobs.cache.dir


def test_versions(monkeypatch):
    metadata = doctor_machine.importlib.metadata
    monkeypatch.setattr(metadata, "requires", lambda name: ['triton==3.6.0; platform_system == "Linux"'])
    monkeypatch.setattr(metadata, "version", lambda name: "3.7.1")
    assert doctor_machine.package_version("triton") == "3.7.1, but torch asks for 3.6.0"
    assert doctor_machine.package_version("torch") == "3.7.1"
    monkeypatch.undo()
    assert doctor_machine.package_version("no-such-package-of-ours") == "not installed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_are_those_of_the_launcher_and_fit(dtype):
    cpu = torch.device("cpu")
    rows = [row for K, V in ((64, 64), (128, 128), (256, 128)) for row in tile_rows(K, V, dtype, cpu)]
    assert len(rows) == 9
    for row in rows:
        assert 0 < row["shared_memory_bytes"] <= row["available_bytes"]
    forward = tiles.attention_tiles(256, 128, dtype, False, cpu)
    assert {name: rows[6][name] for name in forward._fields} == forward._asdict()
    assert len({len(line) for line in format_tiles(rows).splitlines()[1:]}) == 1


def test_a_card_without_room_for_a_tile_is_said(monkeypatch):
    monkeypatch.setattr(tiles, "properties", lambda device: (7, 2**10, 40))
    rows = tile_rows(256, 128, torch.bfloat16, torch.device("meta"))
    assert [row["pass"] for row in rows] == ["both"]
    assert "use a smaller head dim or another GPU" in format_tiles(rows)
