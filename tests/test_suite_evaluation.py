"""Benchmarks inside a training run: the scores that the saved model gets, and training as it would be without them."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.test_report import is_png, train_row, write_run
from tests.tiny_corpus import tiny_shards
from tests.tiny_model import tiny_model
from tests.tiny_run import rows, tiny_run, trajectory
from tnl.errors import ConfigError, DataError
from tnl.evaluation.harness_model import HarnessModel
from tnl.evaluation.suite_command import load_suite
from tnl.tools.report import read_metrics, report
from tnl.training.pretrain import pretrain
from tnl.training.suite_evaluation import open_suite, scores_or_problem

QUICK = ["evaluation.suite=quick", "evaluation.limit=4", "evaluation.every=6"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "with"
    assert pretrain(tiny_run(shards, folder, *QUICK)) == "finished"
    return folder


def test_scores_are_recorded_with_every_evaluation(run):
    found = rows(run, "scores")
    assert [(row["step"], row["tokens"]) for row in found] == [(6, 768), (12, 1536)]
    assert all(0 <= row["Copy"] <= 1 and row["Copy stderr"] >= 0 for row in found)
    assert found[0]["Python byte ppl"] > found[1]["Python byte ppl"] > 1  # it learns


def test_training_goes_on_as_without_them(run, shards, tmp_path):
    pretrain(tiny_run(shards, tmp_path / "without"))
    assert trajectory(run) == trajectory(tmp_path / "without")


def test_they_are_the_scores_of_the_saved_model(run, tnl_command, tmp_path):
    code, _, err = tnl_command("evaluate", run, "--suite", "quick", "--limit", "4", "--output", tmp_path)
    assert code == 0, err
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    saved = {(task, score["metric"]): score["value"] for task, found in scores.items() for score in found}
    expected = {task.column: saved[task.task, task.metric] for task in load_suite("quick").tasks}
    last = {name: value for name, value in rows(run, "scores")[-1].items() if name in expected}
    assert last == pytest.approx(expected, rel=1e-5)


def test_the_report_shows_them(run):
    made = report(run)
    assert is_png(made.folder / "scores.png")
    assert "scores.png" in (made.folder / "index.html").read_text()
    last = rows(run, "scores")[-1]
    assert dict(made.rows)["Copy"].startswith(f"{last['Copy']:.4g}")


def test_the_report_shows_losses_by_source(tmp_path):
    row = {"kind": "evaluation", "step": 1, "tokens": 1000, "loss": 3.0, "loss/books": 2.5, "loss/code": None}
    folder = write_run(tmp_path / "run", [train_row(1), row])
    series = read_metrics(folder).scores
    assert series["held-out loss, books"].values.tolist() == [2.5]
    assert dict(report(folder).rows)["held-out loss, code"] == "nan"


def test_a_model_that_is_not_finite_has_no_scores(shards, run, tmp_path):
    suite = open_suite(tiny_run(shards, run, *QUICK))
    model = tiny_model(vocab_size=340).train()
    model.lm_head.weight.data[:] = float("nan")
    before = torch.get_rng_state()
    scores, problem = scores_or_problem(suite, SimpleNamespace(module=model))
    assert scores == {}
    assert "its log-likelihood is nan" in problem
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_has_diverged_has_no_scores(shards, run):
    suite = open_suite(tiny_run(shards, run, *QUICK))
    model = tiny_model(vocab_size=340, tie_word_embeddings=False)
    model.lm_head.weight.data *= 1e6
    scores, problem = scores_or_problem(suite, SimpleNamespace(module=model))
    assert scores == {}
    assert "a perplexity is beyond all numbers" in problem


def test_a_model_that_ends_at_once_answers_wrongly(shards, run, monkeypatch):
    monkeypatch.setattr(HarnessModel, "generate_until", lambda self, requests, **_: [""] * len(requests))
    suite = open_suite(tiny_run(shards, run, "evaluation.tasks=[tnl_repeat]", "evaluation.limit=4"))
    scores = suite.evaluate(SimpleNamespace(module=tiny_model(vocab_size=340)))
    assert scores["tnl_repeat exact_match"] == 0.0


def test_no_pass_holds_more_tokens_than_one_of_training(shards, run):
    suite = open_suite(tiny_run(shards, run, *QUICK))
    model, sizes = tiny_model(vocab_size=340), []
    model.model.register_forward_pre_hook(lambda module, arguments: sizes.append(arguments[0].numel()))
    suite.evaluate(SimpleNamespace(module=model))
    assert 32 < max(sizes) <= 2 * 32


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        (["evaluation.suite=quik"], ConfigError, "no suite 'quik', did you mean quick"),
        (["evaluation.tasks=[tnl_copi]"], ConfigError, "no task 'tnl_copi', did you mean tnl_copy"),
        (["evaluation.suite=quick", "evaluation.tasks=[piqa]"], ConfigError, "quick has no task 'piqa'"),
        (["evaluation.tasks=[piqa]"], DataError, "evaluation.suite: piqa: its data set"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_run_begins(shards, tmp_path, overrides, kind, message):
    with pytest.raises(kind, match=message):
        pretrain(tiny_run(shards, tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overrides", ["train.zero_stage=3", "model.kind=llama"])
def test_a_model_that_is_not_whole_is_refused(shards, tmp_path, overrides):
    with pytest.raises(ConfigError, match=r"evaluation\.suite: needs a TNL model that is whole on every rank"):
        tiny_run(shards, tmp_path / "run", "evaluation.suite=quick", overrides)
