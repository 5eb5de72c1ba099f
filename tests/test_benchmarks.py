"""The parts of the benchmarks that need no GPU: the fp64 reference, the gate, the shapes, the figure, bad arguments."""

import functools
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tnl_kernels.naive import naive_lightning_attention

from tests.closeness import assert_close

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "kernels" / "benchmarks"
# Scripts that import each other by name, as they do when they are run.
sys.path.append(str(BENCHMARKS))
cases, correctness, plots, reference, shapes = map(
    importlib.import_module, ("cases", "correctness", "plots", "reference", "shapes")
)

SLOPES = torch.tensor([0.0, 1e-3, 0.3, 50.0])
NAMES = ["o", "dq", "dk", "dv", "state", "dinitial"]


def random_problem(T, K, V, N=2, B=2):
    generator = torch.Generator().manual_seed(T)
    sizes = [(B, T, 4, K), (B, T, 4, K), (B, T, 4, V), (B, T, 4, V), (N, 4, K, V), (N, 4, K, V)]
    return [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]


def by_autograd(q, k, v, do, initial_state, dstate, cu_seqlens=None):
    leaves = [x.clone().requires_grad_() for x in (q, k, v, initial_state)]
    *tokens, state = leaves
    outputs = naive_lightning_attention(
        *tokens, SLOPES.double(), initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens
    )
    dq, dk, dv, dinitial = torch.autograd.grad(outputs, leaves, [do, dstate])
    return dict(zip(NAMES, (outputs[0].detach(), dq, dk, dv, outputs[1].detach(), dinitial), strict=True))


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("K", "V"), [(8, 8), (16, 4)])
def test_the_four_scans_are_the_gradients_of_the_recurrence(T, K, V, monkeypatch):
    monkeypatch.setattr(reference, "scan", functools.partial(reference.scan, C=64))
    q, k, v, do, initial_state, dstate = random_problem(T, K, V)
    expected = by_autograd(q, k, v, do, initial_state, dstate)
    actual = reference.attention_reference(q, k, v, SLOPES, do, initial_state=initial_state, dstate=dstate)
    for name in NAMES:
        assert_close(name, actual[name], expected[name])


def test_the_four_scans_start_anew_at_each_document():
    cu_seqlens = torch.tensor([0, 0, 1, 60, 60, 90], dtype=torch.int32)
    q, k, v, do, initial_state, dstate = random_problem(90, 8, 8, N=5, B=1)
    expected = by_autograd(q, k, v, do, initial_state, dstate, cu_seqlens)
    actual = reference.attention_reference(
        q, k, v, SLOPES, do, initial_state=initial_state, dstate=dstate, cu_seqlens=cu_seqlens
    )
    for name in NAMES:
        assert_close(name, actual[name], expected[name])


def test_an_error_in_one_head_is_not_hidden_by_the_others():
    expected = torch.ones(1, 10, 3, 4) * torch.tensor([1.0, 1e3, 1e-9])[:, None]
    actual = expected.clone()
    actual[:, :, 0] *= 1.01
    assert reference.relative_error(actual, expected, 2) == pytest.approx(0.01, rel=1e-3)
    actual[0, 0, 1, 0] = float("nan")
    assert reference.relative_error(actual, expected, 2) == float("inf")


def few(cases_, **changes):
    """Cases with head dims of 16, to be quick."""
    return [replace(case, K=16, V=16, **changes) for case in cases_]


@pytest.mark.parametrize("op", ["plain", "packed", "state"])
def test_the_gate_passes_what_is_right(op, capsys):
    chosen = [case for case in cases.CASES if case.op == op and case.T in (1, 65, 777) and not case.huge]
    rows = correctness.check_all(few(chosen), "cpu")
    assert rows
    assert all(row["ok"] for row in rows), capsys.readouterr().out
    assert all(row["bitwise"] for row in rows)


def test_the_gate_compares_the_heads_it_names():
    case = replace(cases.short(T=65), B=3, slopes=(0.1, 0.2, 0.3, 0.4, 0.5), head_step=4, last_row=True)
    (row,) = correctness.check_all(few([case]), "cpu")
    assert row["ok"], row


def test_the_gate_fails_what_is_wrong(monkeypatch, capsys):
    right = correctness.lightning_attention

    def wrong(q, k, v, slopes, **options):
        return right(q, k, v, slopes * 1.1, **options)

    monkeypatch.setattr(correctness, "lightning_attention", wrong)
    (row,) = correctness.check_all(few([cases.short(T=65)]), "cpu")
    assert not row["ok"]
    assert capsys.readouterr().out.startswith("FAIL plain bf16")


def test_the_gate_fails_what_raises_and_goes_on(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(correctness, "lightning_attention", broken)
    rows = correctness.check_all(few([cases.short(T=65), cases.short(T=65, op="packed")]), "cpu")
    assert [row["ok"] for row in rows] == [False, True]
    assert "an illegal memory access" in correctness.describe(rows[0])


def test_an_error_that_grows_with_the_length_fails():
    def row(name, error):
        return {"case": name, "ok": True, "errors": {"o": error, "dq": 1e-3}}

    for error, ok in ((1.05e-3, True), (1.2e-3, False)):
        rows = [row("growth T1024", 1e-3), row("growth T131072", error)]
        correctness.add_growth(rows)
        assert rows[1]["ok"] is ok


def test_the_parts_of_the_gate_are_all_cases_once(monkeypatch):
    seen = []
    monkeypatch.setattr(correctness, "check_all", lambda chosen, device: seen.extend(chosen) or [{"ok": True}])
    for part in range(8):
        assert correctness.main(["--part", f"{part}/8"]) == 0
    assert correctness.main(["--huge"]) == 0
    assert sorted(case.name for case in seen) == sorted(case.name for case in cases.CASES)
    assert len({case.name for case in seen}) == len(seen)


def test_the_floor_is_four_units_forward_and_seven_backward():
    shape = shapes.wide(4096, (1.12, 1.55), ())
    unit = 4 * 4096 * 32 * 128 * 2
    assert shape.floor_bytes("forward") == 4 * unit
    assert shape.floor_bytes("backward") == 7 * unit


def test_shapes_are_chosen_by_name():
    assert [shape.T for shape in shapes.select(shapes.TIMED, "B1 H16 D128 T")] == [16384, 131072]
    with pytest.raises(ValueError, match="no shape has 'D32'; there are: B4 H32 D128 T1024"):
        shapes.select(shapes.TIMED, "T1024, D32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "D32"], "no shape has 'D32'"),
        (["--no-gates", "--json", "x.json"], "not saved"),
        (["--fast"], "unrecognized arguments"),
    ],
)
def test_a_bad_command_line_ends_with_what_is_wrong(arguments, message, capsys):
    attention = importlib.import_module("attention")
    with pytest.raises(SystemExit) as stop:
        attention.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
@pytest.mark.parametrize("script", ["attention", "compile_time"])
def test_without_a_gpu_it_says_so(script, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main([])
    assert stop.value.code == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_rows_hold_multiples_of_the_floor():
    attention = importlib.import_module("attention")
    shape = shapes.wide(4096, (1.12, 1.55), ("sdpa_flash",))
    ours = {"forward_ms": 0.2, "backward_ms": 0.5, "memory_x": 1.0, "method": "events", "peak_bytes": 2**30}
    forward, backward = attention.shape_rows(shape, {"tnl": ours, "sdpa_flash": None}, 3e12)
    assert forward["floor_ms"] == pytest.approx(0.1790, rel=1e-3)
    assert forward["tnl_x"] == pytest.approx(1.12, abs=0.01)
    assert backward["target_x"] == 1.55
    assert forward["sdpa_flash_ms"] is None
    assert attention.missed_targets(forward) == []
    assert attention.missed_targets(backward | {"memory_x": 1.2}) == ["time", "memory"]
    row = attention.scaling_row(shape, {"tnl": ours, "sdpa_flash": None})
    assert row == {
        "shape": "B4 H32 D128", "T": 4096, "tnl_ms": 0.7, "tnl_gib": 1.0, "sdpa_flash_ms": None, "sdpa_flash_gib": None
    }  # fmt: skip


def without_cuda(monkeypatch, measure, peers):
    """Make `measure.measure` work on CPU: memory is what the test says, a time is one call's."""

    def call_once(function, least=7):
        function()
        return 2.0

    for name in ("empty_cache", "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**24)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**25)
    monkeypatch.setattr(measure, "median_ms", call_once)
    slopes, offsets = shapes.timed_slopes, shapes.document_offsets
    for module in (measure, peers):
        monkeypatch.setattr(module, "timed_slopes", lambda H, device: slopes(H, "cpu"))
    monkeypatch.setattr(peers, "document_offsets", lambda documents, T, device: offsets(documents, T, "cpu"))
    monkeypatch.setattr(peers, "normal", lambda *size, device: shapes.normal(*size, device="cpu"))


@pytest.mark.parametrize(
    "shape",
    [
        shapes.Shape(2, 1024, 2, 16, 16),
        shapes.Shape(1, 100, 2, 32, 16),
        shapes.Shape(1, 100, 2, 16, 16, documents=4),
        shapes.Shape(2, 100, 2, 16, 16, packed=True),
    ],
    ids=lambda shape: shape.label,
)
def test_every_kind_of_shape_is_measured(shape, monkeypatch):
    measure, peers = map(importlib.import_module, ("measure", "peers"))
    without_cuda(monkeypatch, measure, peers)
    result = measure.measure("tnl", shape)
    assert result["forward_ms"] == result["backward_ms"] == 2.0
    assert result["method"] == "events"
    assert result["memory_x"] > 0
    assert ("error" in result) == (shape.T == 1024)
    assert result.get("error", 0) < 3e-3

    def refuse(function):
        raise RuntimeError("not permitted when stream is capturing")

    monkeypatch.setattr(measure, "graph_ms", refuse)
    refused = measure.measure("tnl", shape, graph=True)
    assert refused["method"] == "events"
    assert "capturing" in refused["not_captured"]
    monkeypatch.setattr(measure, "graph_ms", measure.median_ms)
    assert measure.measure("tnl", shape, graph=True)["method"] == "graph"


def test_a_figure_is_drawn_from_the_stored_rows(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = [
        {"shape": "B1 H16 D128", "T": T, "tnl_ms": T / 1e5, "tnl_gib": T / 1e4}
        | {"lightning_attn2_ms": T / 1e4, "lightning_attn2_gib": T / 1e4, "sdpa_flash_ms": None}
        for T in (1024, 2048, 131072)
    ]
    result, figure = tmp_path / "attention_h100.json", tmp_path / "figure.png"
    result.write_text(json.dumps({"gpu": "NVIDIA H100 80GB HBM3", "scaling": rows}))
    assert plots.main([str(result), str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size < 100_000
    result.write_text(json.dumps({"gpu": "NVIDIA H100 80GB HBM3", "scaling": []}))
    with pytest.raises(SystemExit):
        plots.main([str(result), str(figure)])
    assert "no rows under 'scaling'" in capsys.readouterr().err
