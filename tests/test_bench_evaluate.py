"""`tnl bench evaluate`: figures of both adapters that belong together, and parts that fail alone."""

import json

import numpy as np
import pytest
import torch

from tests.tiny_model import tiny_model
from tnl.evaluation.made_requests import ChoiceShape
from tnl.evaluation.request_scores import RequestScores
from tnl.tools import bench_evaluate

TINY = ["--subjects", "2", "--questions", "3", "--contexts", "3", "--document", "700", "--batch-tokens", "1700"]


MODEL = "{hidden_size: 32, num_layers: 2, num_heads: 2, glu_dim: 48, vocab_size: 100}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "small.yaml"
    file.write_text(MODEL)
    return str(file)


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory):
    lines, file = [], tmp_path_factory.mktemp("bench") / "new" / "evaluate.json"
    bench_evaluate.bench_evaluate(
        model,
        work=bench_evaluate.EvaluateWork(2, 3, 3, 700, 1700),
        parts=list(bench_evaluate.PARTS),
        device="cpu",
        json_file=file,
        report=lines.append,
    )
    result = json.loads(file.read_text())
    return {row["part"]: row for row in result["rows"]}, result, lines


def test_both_adapters_give_the_same_answers(measured):
    rows, _, _ = measured
    shapes = [rows[part] for part in ("mmlu", "hellaswag", "long-choices")]
    for row in shapes + rows["accuracy"]["shapes"]:
        assert row["equal_answers"] == 1.0
        assert row["largest_difference"] <= bench_evaluate.FP32_TOLERANCE
    assert [row["problem"] for row in rows.values()] == [None] * 5


def test_errors_are_those_of_a_dtype(measured):
    errors = measured[1]["errors"]
    names = [(error["shape"], error["adapter"], error["dtype"]) for error in errors]
    shapes = ("mmlu", "long-choices", "hellaswag")
    assert names == [(shape, adapter, "float32") for shape in shapes for adapter in ("ours", "hf")]
    assert all(0 < error["largest_difference"] < bench_evaluate.FP32_TOLERANCE for error in errors)


def test_in_bf16_answers_are_compared_with_a_softmax_in_fp32():
    model = tiny_model(vocab_size=100).bfloat16()
    shape = ChoiceShape(1, 6, prefix=0, question=8, choices=4, choice=30)
    row = bench_evaluate.compare_adapters(model, shape, 300)
    assert row["times_hf_float32"] == row["hf_float32_seconds"] / row["ours_seconds"]
    found = bench_evaluate.measure_accuracy(model, shape, 300)
    assert model.dtype == torch.bfloat16
    names = [(error["adapter"], error["dtype"], error["softmax"]) for error in found["errors"]]
    assert names[2:] == [("ours", "bfloat16", "float32"), ("hf", "bfloat16", "bfloat16"), ("hf", "bfloat16", "float32")]
    ours, rounded, theirs = (error["mean_difference"] for error in found["errors"][2:])
    assert rounded > 2 * ours  # scores of -140 are multiples of 1
    assert ours < 2 * theirs
    row = {"part": "accuracy", "problem": None, "tolerance": 1e-4, "shapes": [found | {"shape": "x"}]}
    text = bench_evaluate.line(row)
    assert text.count("\n") == 5
    assert text.startswith("accuracy, x: 6 questions in fp32: 100.00% equal answers")


def test_ours_reads_a_beginning_once_and_theirs_with_every_question(measured):
    rows, _, _ = measured
    assert rows["mmlu"]["ours_tokens_read"] == 2 * (700 + 3 * 100)
    assert rows["mmlu"]["hf_tokens_read"] == 2 * 3 * 800
    assert (rows["mmlu"]["hf_batch_size"], rows["hellaswag"]["hf_batch_size"]) == (2, 15)
    assert rows["hellaswag"]["ours_tokens_read"] == 3 * (80 + 4 * 29)
    assert rows["hellaswag"]["hf_tokens_read"] == 3 * 4 * 109
    for part in ("mmlu", "hellaswag", "long-choices"):
        assert rows[part]["times_hf"] == pytest.approx(rows[part]["hf_seconds"] / rows[part]["ours_seconds"])


def test_the_long_text_is_read_in_parts(measured):
    row = measured[0]["document"]
    assert (row["tokens"], row["short_tokens"]) == (700, 700)
    assert row["long_nats_per_token"] == pytest.approx(row["short_nats_per_token"], abs=1e-5)
    assert row["tokens_per_s"] == pytest.approx(700 / row["long_seconds"])


def test_the_figures_say_what_they_are_of(measured):
    _, result, lines = measured
    assert result["lm_eval"]
    assert result["command"].endswith(" ".join(TINY))
    assert len(lines) == 1 + len(result["rows"])
    assert any(line.startswith("mmlu: 6 questions") and "times as long" in line for line in lines)


def test_a_part_that_fails_is_a_row_and_the_others_go_on(tnl_command, model, tmp_path, monkeypatch):
    real = RequestScores.compute

    def compute(self, reader, sequences, asked):
        if len(sequences) == 1:
            raise RuntimeError("no kernel image")
        real(self, reader, sequences, asked)

    monkeypatch.setattr(RequestScores, "compute", compute)
    file = tmp_path / "e.json"
    code, out, err = tnl_command(
        "bench", "evaluate", model, *TINY, "--only", "hellaswag,document", "--device", "cpu", "--json", file
    )
    assert code == 0, err
    hellaswag, document = json.loads(file.read_text())["rows"]
    assert hellaswag["equal_answers"] == 1.0
    assert document["problem"] == "RuntimeError: no kernel image"
    assert "document: RuntimeError: no kernel image" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "mmlu,helaswag"], "--only: no part 'helaswag'; give some of mmlu,hellaswag"),
        (["--json", "."], "--json: . is a folder; name a file"),
    ],
)
def test_what_cannot_be_meant_is_refused(tnl_command, arguments, message):
    code, _, err = tnl_command("bench", "evaluate", "tnl-tiny", *arguments)
    assert code == 2
    assert message in err


def test_made_choices_differ_in_their_first_token():
    requests = ChoiceShape(2, 5, prefix=7, question=3, choices=4, choice=2).requests(50)
    assert len(requests) == 40
    for i in range(0, 40, 4):
        contexts, choices = zip(*((context, choice) for _, context, choice in requests[i : i + 4]), strict=True)
        assert len({tuple(context) for context in contexts}) == 1
        assert len({choice[0] for choice in choices}) == 4
        assert contexts[0][:7] == requests[i // 20 * 20][1][:7]


def test_answers_that_differ_tell_by_how_much():
    ours, theirs = np.array([1.0, 2.0, 0.0, 5.0]), np.array([1.5, 1.0, 0.0, 5.0])
    found = bench_evaluate.differences(ours, theirs, 2)
    assert found == {
        "equal_answers": 0.5,
        "margin_of_unequal": 0.5,
        "largest_difference": 1.0,
        "mean_difference": 0.375,
    }
