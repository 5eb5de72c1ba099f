"""`tnl bench finetune`: figures that belong together, examples as long as Alpaca's, parts that fail alone."""

import gc
import importlib
import json
import statistics
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from tnl.tools import bench_finetune
from tnl.training.engine import init_ranks

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "kernels" / "benchmarks"))
SMALL = ["model.vocab_size=100", "model.hidden_size=32", "model.num_heads=2", "model.glu_dim=64"]
TINY = ["tnl-tiny", *SMALL, "--lora-model", "tnl-tiny", "--pass-tokens", "512", "--passes", "2", "--lora-tokens", "64"]
TINY += ["--examples", "100", "--steps", "2"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Both parts, with what they print."""
    file = tmp_path_factory.mktemp("bench") / "new" / "finetune.json"
    lines = []
    bench_finetune.bench_finetune(
        "tnl-tiny",
        lora_name="tnl-tiny",
        parts=list(bench_finetune.PARTS),
        pass_tokens=512,
        passes=2,
        lora_tokens=64,
        base_bits=[4, 16],
        num_examples=100,
        steps=2,
        overrides=SMALL,
        json_file=file,
        report=lines.append,
    )
    return json.loads(file.read_text()), lines


def test_every_row_has_figures_that_belong_together(measured):
    result, lines = measured
    packing = {row["batching"]: row for row in result["packing"]}
    assert list(packing) == ["packed", "grouped", "padded"]
    assert [row["base_bits"] for row in result["lora"]] == [4, 16]
    for row in [*result["packing"], *result["lora"]]:
        assert row["problem"] is None
        speeds = [tokens / s for tokens, s in zip(row["step_tokens"], row["step_s"], strict=True)]
        assert len(speeds) == 2
        assert row["tokens_per_s"] == pytest.approx(statistics.median(speeds))
        assert row["loss"] == pytest.approx(4.6, abs=0.2)  # ln 100
        most = 2 * (512 if "batching" in row else 64)
        assert all(0 < tokens <= most for tokens in row["step_tokens"])
    for row in packing.values():
        assert row["times_padded"] == pytest.approx(row["tokens_per_s"] / packing["padded"]["tokens_per_s"])
    assert packing["packed"]["waste"] < 0.1 < packing["padded"]["waste"]
    assert sum(packing["packed"]["step_tokens"]) > sum(packing["padded"]["step_tokens"])
    assert any(line.startswith("tnl-tiny, packed") and "times padded" in line for line in lines)


def test_a_document_is_made_from_it(measured, tmp_path):
    (tmp_path / "finetune_h100.json").write_text(json.dumps(measured[0] | {"gpu": "NVIDIA H100 80GB HBM3"}))
    tables = importlib.import_module("tables")
    text = tables.table("finetune of=packing columns=batching,waste%,tokens_per_s,times_padded", tmp_path)
    assert len(text.splitlines()) == 4 + 3
    text = tables.table("finetune of=lora columns=model,base_bits,length,peak_gib,tokens_per_s", tmp_path)
    assert len(text.splitlines()) == 4 + 2


def test_made_examples_are_as_long_as_alpacas():
    """The histogram that the constants were fitted to, in a count of 52,002."""
    lengths = bench_finetune.made_examples(52002, 2048, 64000).lengths
    for bound, part in ((144, 0.8176), (269, 0.9762), (393, 0.9951), (518, 0.9988)):
        assert (lengths <= bound).mean() == pytest.approx(part, abs=0.005)
    assert lengths.mean() == pytest.approx(100, abs=1)
    assert 700 < lengths.max() <= 2048


def test_made_tokens_are_no_padding_and_the_answer_is_learned():
    examples = bench_finetune.made_examples(50, 128, 100)
    assert examples.ids.min() >= bench_finetune.FIRST_ID > bench_finetune.PAD_ID
    assert examples.lengths.max() <= 128
    for ids, trained in (examples[i] for i in range(50)):
        assert not trained[0]
        assert trained[-1]
        assert trained.mean() == pytest.approx(0.7, abs=1 / len(ids) + 1e-9)
        assert (np.diff(trained.astype(int)) >= 0).all()


def test_what_cannot_be_measured_is_a_row_and_the_rest_goes_on(tnl_command, tmp_path, monkeypatch):
    real = bench_finetune.TrainStep.run

    def step(self, micro_batches, **options):
        if micro_batches[0]["input_ids"].shape[-1] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, micro_batches, **options)

    monkeypatch.setattr(bench_finetune.TrainStep, "run", step)
    monkeypatch.setitem(sys.modules, "torchao", None)
    code, out, err = tnl_command("bench", "finetune", *TINY, "--json", tmp_path / "f.json")
    assert code == 0, err
    result = json.loads((tmp_path / "f.json").read_text())
    assert [row["problem"] for row in result["packing"]] == ["does not fit into memory"] * 3
    assert "4 needs torchao" in result["lora"][0]["problem"]
    assert result["lora"][1]["tokens_per_s"] > 0
    assert "tnl-tiny, packed  " in out
    assert "LoRA on 4 bits, 64 tokens: method.base_bits: 4 needs torchao" in out


def test_other_errors_are_not_swallowed(monkeypatch):
    with pytest.raises(RuntimeError, match="shapes"), bench_finetune._problems_noted([{}]):
        raise RuntimeError("shapes do not match")


def test_a_row_leaves_nothing_behind(monkeypatch):
    watched = []
    real = bench_finetune.build_engine

    def build(settings, model, ranks):
        watched.append(weakref.ref(model.model.layers[0].channel_mixer.l1.lora_A.default.weight))
        return real(settings, model, ranks)

    monkeypatch.setattr(bench_finetune, "build_engine", build)
    settings = bench_finetune._settings("tnl-tiny", bench_finetune._lora(16), 64, 1, SMALL)
    examples = bench_finetune.made_examples(10, 64, 100)
    row = bench_finetune.measure_lora("tnl-tiny", settings, examples, init_ranks(), 1)
    assert row["problem"] is None
    gc.collect()
    assert watched[0]() is None


def test_one_part_alone(tnl_command, tmp_path):
    code, _, err = tnl_command(
        "bench", "finetune", *TINY, "--only", "lora", "--bits", "16", "--json", tmp_path / "f.json"
    )
    assert code == 0, err
    result = json.loads((tmp_path / "f.json").read_text())
    assert "packing" not in result
    assert len(result["lora"]) == 1
    assert "--only lora" in result["command"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.micro_batch_size=3"], "train.micro_batch_size: not an override of a benchmark"),
        (["data.template=x"], "data: not an override of a benchmark"),
        (["train.zero_stag=2"], "train.zero_stag: unknown key, did you mean zero_stage"),
        (["--bits", "8"], "method.base_bits: input should be 4 or 16"),
        (["--lora-model", "tnl-9b"], "model/tnl-9b: no such file"),
        (["--json", "."], "--json: . is a folder; name a file"),
    ],
)
def test_what_cannot_be_meant_is_refused(tnl_command, arguments, message):
    code, _, err = tnl_command("bench", "finetune", *TINY, *arguments)
    assert code == 2
    assert message in err
