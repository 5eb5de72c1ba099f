"""`tnl bench train`: figures that belong together, engines that make the same steps, memory that does not suffice."""

import gc
import importlib
import json
import sys
import weakref
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_processes import torchrun
from tests.tiny_model import tiny_config
from tnl.model import TransnormerForCausalLM
from tnl.model.baseline import llama_config
from tnl.model.baseline_training import LlamaBaseline
from tnl.model.flops import matmul_parameters
from tnl.model.kinds import model_class, model_config
from tnl.tools import bench_train
from tnl.tools.bench_engines import Place, build, engine_version, join
from tnl.tools.gemm_limit import gemm_limit, last_of_blocks, linear_shapes
from tnl.training.gradient_reduction import GradientReduction

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "kernels" / "benchmarks"))
SMALL = ["model.vocab_size=100", "model.hidden_size=32", "model.num_heads=2", "model.glu_dim=48"]
TINY = ["tnl-tiny", *SMALL, "--tokens-per-step", "64", "--micro-tokens", "32", "--steps", "2"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Both kinds at three lengths, one above the micro-batch and one above the step, with the loop's engine."""
    folder = tmp_path_factory.mktemp("bench")
    lines = []
    bench_train.bench_train(
        "tnl-tiny",
        lengths=[16, 64, 128],
        tokens_per_step=64,
        micro_tokens=32,
        kinds=["tnl", "llama"],
        steps=2,
        warmup=1,
        engine=None,
        overrides=SMALL,
        json_file=folder / "new" / "train.json",
        report=lines.append,
    )
    return json.loads((folder / "new" / "train.json").read_text()), lines


def test_every_row_has_figures_that_belong_together(measured):
    result, lines = measured
    assert result["engine"] == engine_version("deepspeed")
    assert [(row["kind"], row["length"]) for row in result["rows"]] == [
        (kind, length) for kind in ("tnl", "llama") for length in (16, 64, 128)
    ]
    assert [(row["micro_batch"], row["passes"]) for row in result["rows"][:3]] == [(2, 2), (1, 1), (1, 1)]
    for row in result["rows"]:
        tokens = row["micro_batch"] * row["passes"] * row["length"]
        assert row["tgs"] == pytest.approx(tokens / (sum(row["step_s"]) / 2))
        assert row["of_limit"] == pytest.approx(row["tgs"] / row["limit_tgs"])
        assert 0 < row["mfu"] < 1
        assert not row["oom"]
        assert row["loss"] == pytest.approx(4.6, abs=0.2)  # ln 100
    assert abs(result["rows"][0]["parameters"] / result["rows"][3]["parameters"] - 1) <= 0.005
    assert any(line.startswith("llama            128 tokens:") for line in lines)


def test_the_table_has_a_column_for_each_kind(measured):
    result, _ = measured
    assert [row["length"] for row in result["table"]] == [16, 64, 128]
    for i, row in enumerate(result["table"]):
        tnl, llama = result["rows"][i], result["rows"][i + 3]
        assert (row["tnl_tgs"], row["llama_tgs"]) == (tnl["tgs"], llama["tgs"])
        assert row["times_llama"] == pytest.approx(tnl["tgs"] / llama["tgs"])
    tgs = [row["tgs"] for row in result["rows"][:3]]
    assert result["spread"]["tnl"] == pytest.approx(1 - min(tgs) / max(tgs))


def test_a_document_and_a_figure_are_made_from_it(measured, tmp_path):
    tables, plots = (importlib.import_module(name) for name in ("tables", "plots"))
    result = measured[0] | {"gpu": "NVIDIA H100 80GB HBM3"}
    (tmp_path / "train_h100.json").write_text(json.dumps(result))
    text = tables.table("train of=table columns=length,tnl_tgs:TNL,llama_tgs:LLaMA", tmp_path)
    assert text.splitlines()[2] == "| length | TNL | LLaMA |"
    assert len(text.splitlines()) == 4 + 3
    assert plots.main([str(tmp_path / "train_h100.json"), str(tmp_path / "train.png")]) == 0
    assert (tmp_path / "train.png").read_bytes()[:4] == b"\x89PNG"


def rows_of(tnl_command, tmp_path, *arguments) -> list[dict]:
    file = tmp_path / "figures.json"
    code, _, err = tnl_command("bench", "train", *TINY, *arguments, "--json", file)
    assert code == 0, err
    return json.loads(file.read_text())["rows"]


def test_both_engines_make_the_same_steps(tnl_command, tmp_path):
    """fp32 against the loop's stage 0; bf16 with fp32 masters and sums against its stage 2."""
    fast = ["--lengths", "16", "--kinds", "tnl", "optimizer.lr=3e-2"]
    for precision in (["train.precision=fp32"], ["train.precision=bf16", "train.zero_stage=2"]):
        losses = [
            rows_of(tnl_command, tmp_path, *fast, *precision, "--engine", engine)[0]["loss"]
            for engine in ("deepspeed", "torch")
        ]
        assert losses[0] < 4.3  # it begins to know the step's tokens by heart, so the updates count
        assert losses[1] == pytest.approx(losses[0], rel=1e-5 if "fp32" in precision[0] else 2e-2)


def test_checkpointing_is_held_against_the_limit_with_recomputation(tnl_command, tmp_path, monkeypatch):
    options = ["--lengths", "32", "--kinds", "tnl", "--engine", "torch"]
    found = {}
    real = bench_train.gemm_limit

    def keep(*arguments):
        found["limit"] = real(*arguments)
        return found["limit"]

    monkeypatch.setattr(bench_train, "gemm_limit", keep)
    # Blocks 0 and 2 of three.
    for mode, recomputed in {"full": 1.0, "every_k": 2 / 3, "selective": 1.0, "selective_matmuls": 0.0}.items():
        given = [f"train.activation_checkpointing={mode}"]
        given += ["train.activation_checkpointing_k=2"] if mode == "every_k" else []
        (row,) = rows_of(tnl_command, tmp_path, *options, *given)
        limit = found["limit"]
        assert row["limit_tgs"] == pytest.approx(32 / (limit.step_s + recomputed * limit.recompute_s)), mode
        assert row["recomputed"] == recomputed
        assert ("made twice" in bench_train.line(row)) == (recomputed > 0)


def test_a_sequence_is_run_in_segments(tnl_command, tmp_path):
    options = ["--lengths", "64", "--kinds", "tnl", "--engine", "torch"]
    (whole,) = rows_of(tnl_command, tmp_path, *options)
    (cut,) = rows_of(tnl_command, tmp_path, *options, "train.segment_length=16", "train.segment_gradient=exact")
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_the_products_are_those_of_the_parameters_that_multiply():
    config = tiny_config(tie_word_embeddings=False)
    with torch.device("meta"):
        blocks, head = linear_shapes(TransnormerForCausalLM(config))
    weights = sum(out * into * count for (out, into), count in blocks.items()) + head[0] * head[1]
    assert weights == matmul_parameters(config)
    assert blocks[4 * 32, 32] == 2
    assert head == (61, 32)
    with torch.device("meta"):
        llama = LlamaBaseline(llama_config(config))
    assert last_of_blocks(llama) == {(32, llama.config.intermediate_size): 2}
    assert last_of_blocks(TransnormerForCausalLM(config)) == {(32, 48): 2}


class Products(TorchDispatchMode):
    """The shapes of the matrix products that are computed outside of our own operators, and how often."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.found[(tuple(args[0].shape), tuple(args[1].shape))] += 1
        return func(*args, **(kwargs or {}))


def outside(function) -> Counter:
    with Products() as products:
        function()
    return products.found


def everywhere(function) -> Counter:
    """The same also inside of them; one that a checkpoint breaks off before it is computed counts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function()
    return Counter(tuple(map(tuple, event.input_shapes[:2])) for event in profile.events() if event.name == "aten::mm")


def one_pass(engine, batch: dict) -> None:
    engine(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss_sum.backward()


@pytest.mark.parametrize("kind", ["tnl", "llama"])
def test_the_limit_makes_the_products_of_a_step_and_no_other(kind, monkeypatch):
    place = Place(0, 1, CPU)
    model = bench_train.configuration.load(bench_train.ModelSettings, "model/tnl-tiny").model_dump(mode="json")
    steps = {}
    for mode in ("none", "full"):
        given = [*SMALL, f"train.activation_checkpointing={mode}"]
        settings = bench_train.settings_of(model, kind, 96, 96, 96, place, given)
        config = model_config(settings.model, 96)
        engine = build("torch", partial(model_class(config), config), settings, place)
        (batch,) = bench_train.micro_batches(settings, config.vocab_size, 1, place)
        steps[mode] = partial(one_pass, engine, batch)
    timed = []
    monkeypatch.setattr("tnl.tools.gemm_limit._median_s", lambda function, device: timed.append(function) or 1.0)
    with torch.device("meta"):
        gemm_limit(model_class(config)(config), 96, CPU, torch.float32)
    whole, again = timed
    assert everywhere(steps["none"]) == everywhere(whole)
    assert outside(steps["full"]) - outside(steps["none"]) == outside(again)


def test_what_does_not_fit_into_memory_is_a_row_and_the_next_length_goes_on(tnl_command, tmp_path, monkeypatch):
    real = bench_train.training_step

    def step(engine, reduction, batches, train, place):
        if train.sequence_length == 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(engine, reduction, batches, train, place)

    monkeypatch.setattr(bench_train, "training_step", step)
    code, out, _ = tnl_command("bench", "train", *TINY, "--lengths", "32,64", "--json", tmp_path / "f.json")
    assert code == 0
    assert "32 tokens: does not fit into memory" in out
    result = json.loads((tmp_path / "f.json").read_text())
    assert [row["oom"] for row in result["rows"]] == [True, False, True, False]
    assert result["table"][0]["llama_tgs"] == "OOM"
    assert "llama" in result["spread"]


@pytest.mark.parametrize("engine", ["deepspeed", "torch"])
def test_a_row_leaves_nothing_behind(engine):
    place = join(engine)
    model = bench_train.configuration.load(bench_train.ModelSettings, "model/tnl-tiny").model_dump(mode="json")
    settings = bench_train.settings_of(model, "tnl", 16, 32, 16, place, SMALL)
    built = build(engine, lambda: TransnormerForCausalLM(settings.model.to_config()), settings, place)
    batches = bench_train.micro_batches(settings, 100, 2, place)
    bench_train.training_step(built, GradientReduction(built, settings.train), batches, settings.train, place)
    watched = weakref.ref(built.module.model.layers[0].channel_mixer.l1.weight)
    built.destroy()
    del built
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "tnl,mamba"], "--kinds: mamba: unknown, give some of tnl, tnl-fla, llama, llama-cudnn"),
        (["--lengths", "24"], "--tokens-per-step: 64 in passes of 1 x 32 tokens do not divide into sequences of 24"),
        (["--lengths", "48"], "do not divide into sequences of 48"),
        (["train.micro_batch_size=3"], "train.micro_batch_size: not an override of a benchmark"),
        (["train.zero_stage=3", "--engine", "torch"], "this engine shards nothing"),
        (["data.shards=x"], "data: not an override of a benchmark"),
        (["train.zero_stag=2"], "train.zero_stag: unknown key, did you mean zero_stage"),
        (["train.precision=fp16", "train.zero_stage=2"], "train.precision: fp16: not measured"),
        (["--lengths", "1"], "--lengths: '1' is no list of whole numbers of at least 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(tnl_command, arguments, message):
    code, _, err = tnl_command("bench", "train", *TINY, *arguments)
    assert code == 2
    assert message in err


def test_both_engines_make_the_same_steps_on_two_processes(tnl_command, tmp_path):
    options = ["--tokens-per-step", "128", "--micro-tokens", "64", "--lengths", "64", "--kinds", "tnl", "--steps", "1"]
    (whole,) = rows_of(tnl_command, tmp_path, *options, "optimizer.lr=3e-2", "--warmup", "1", "--engine", "torch")
    done = torchrun(str(ROOT / "tests/bench_worker.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    names = ("deepspeed", "torch", "sequence-parallel")
    found = [json.loads((tmp_path / f"{name}.json").read_text()) for name in names]
    for a, b, _ in zip(*(result["rows"] for result in found), strict=True):
        assert a["passes"] == b["passes"] == 128 // 2 // max(32, a["length"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert [row["passes"] for row in found[2]["rows"]] == [2, 2]
    assert [row["micro_batch"] for row in found[2]["rows"]] == [4, 1]
    assert all(result["world_size"] == 2 for result in found)
    # The same windows, whole in one process.
    assert found[2]["rows"][1]["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    # Rank 0 alone reports.
    assert done.stdout.count("tokens a step") == 3


def test_a_place_is_the_only_process_where_nobody_says_otherwise(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    expected = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    assert join("torch") == Place(0, 1, expected)
