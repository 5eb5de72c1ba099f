"""Scores, their standard errors and losses per token, word and byte are what they are by definition."""

import math
import types
import warnings

import numpy as np
import pytest
from lm_eval.api.metrics import mean, perplexity, weighted_perplexity

from tnl.errors import NonFiniteError
from tnl.evaluation.scrolls_tasks import best_f1, best_rouge
from tnl.evaluation.suite_settings import SuiteSettings
from tnl.evaluation.suite_tables import losses_table, suite_table
from tnl.evaluation.task_scores import Score, TextLoss, group_scores, metric_error, task_scores


def score(task: str, value: float, stderr: float | None, count: int, metric: str = "acc") -> Score:
    return Score(task, metric, value, stderr, count, 0, "1.0", True)


def test_standard_errors_are_those_of_resampling():
    draw = np.random.default_rng(0)
    nats, words = draw.normal(2, 0.5, 400), draw.integers(5, 50, 400)
    texts = [(-float(n * w), int(w)) for n, w in zip(nats, words, strict=True)]
    lls = [-float(n) for n in nats]
    answers = [float(a) for a in draw.integers(0, 2, 400)]
    for aggregate, items in ((mean, answers), (perplexity, lls), (weighted_perplexity, texts)):
        picks = draw.integers(0, 400, (1000, 400))
        expected = np.std([aggregate([items[i] for i in pick]) for pick in picks])
        assert metric_error(aggregate, items) == pytest.approx(expected, rel=0.1)
    assert metric_error(mean, [1.0]) is None


def test_a_metric_without_closed_form_is_resampled():
    def median(items):
        return float(np.median(items))

    items = [float(i) for i in range(100)]
    found = metric_error(median, items)
    assert found == metric_error(median, items)
    assert found == pytest.approx(4.9, rel=0.2)


def test_resampling_is_silent(recwarn):
    def doubtful(items):
        warnings.warn("few of them", stacklevel=1)
        return items[0]

    assert metric_error(doubtful, [1.0, 2.0]) > 0
    assert not recwarn


def test_a_group_is_the_mean_over_documents_or_over_tasks():
    answers = [[1.0, 0.0, 1.0, 1.0], [0.0, 1.0]]
    parts = [[score(str(i), np.mean(a), metric_error(mean, a), len(a))] for i, a in enumerate(answers)]
    (by_size,) = group_scores("g", parts, {"acc": True})
    assert (by_size.value, by_size.num_documents, by_size.num_parts) == (4 / 6, 6, 2)
    (by_task,) = group_scores("g", parts, {"acc": False})
    assert by_task.value == (0.75 + 0.5) / 2
    assert by_task.stderr == pytest.approx(math.hypot(parts[0][0].stderr, parts[1][0].stderr) / 2)
    # lm-eval's own formula, of the pooled variance.
    errors = [part[0].stderr for part in parts]
    pooled = (3 * errors[0] ** 2 * 4 + 1 * errors[1] ** 2 * 2) / (6 - 2)
    assert by_size.stderr == pytest.approx(math.sqrt(pooled / 6))


def test_a_group_has_no_mean_of_perplexities():
    parts = [[score("a", 9.0, 1.0, 2, "word_perplexity")], [score("b", 5.0, 1.0, 2, "word_perplexity")]]
    assert group_scores("g", parts, {}) == []


def test_a_score_that_is_not_finite_is_an_error():
    task = types.SimpleNamespace(
        task_name="t",
        VERSION=1,
        aggregation=lambda: {"acc": mean},
        higher_is_better=lambda: {"acc": True},
        get_config=lambda key: 0,
    )
    samples = [{"metrics": ["acc"], "filter": "none", "acc": float("nan")}]
    with pytest.raises(NonFiniteError, match="t: acc is nan"):
        task_scores(task, samples)


def test_losses_are_shown_in_nats_bits_and_perplexity():
    loss = TextLoss("t", "byte", math.log(8), 0.01, 100)
    (row,) = losses_table([loss], "here").rows
    assert row.cells["bits"].value == pytest.approx(3)
    assert row.cells["perplexity"].value == pytest.approx(8)
    assert row.cells["perplexity"].stderr == pytest.approx(0.08)
    assert row.cells["bits"].stderr == pytest.approx(0.01 / math.log(2))


def test_a_table_has_percents_averages_and_says_what_is_incomplete():
    suite = SuiteSettings(
        title="t",
        tasks=(
            dict(task="a", column="A", metric="acc"),
            dict(task="g", column="G", metric="acc"),
            dict(task="c", column="C", metric="ppl", unit="raw"),
        ),
        averages=(dict(column="M", of=("A", "G")), dict(column="N", of=("A", "C"))),
        published=(dict(model="p", parameters="1B", source="s", scores={"A": 50.0}),),
    )
    scores = {"a": [score("a", 0.5, 0.03, 4)], "g": [score("g", 0.25, 0.04, 4)]}
    ours, published = suite_table(suite, ("m", "3M"), "here", scores, {"a": 1, "g": 2}).rows
    assert (ours.cells["A"].value, ours.cells["A"].stderr) == (50, 3)
    assert ours.cells["G"].note == "of 1 of 2 tasks only"
    assert ours.cells["M"].value == 37.5
    assert ours.cells["M"].stderr == pytest.approx(2.5)
    assert "N" not in ours.cells
    assert published.texts == ("p", "1B", "-")
    assert {column: cell.value for column, cell in published.cells.items()} == {"A": 50}


def test_f1_is_that_of_squad():
    assert best_f1("The state, of self!", ["state of a self"]) == 1
    assert best_f1("value of state", ["return value", "nothing"]) == pytest.approx(2 * (1 / 3) * (1 / 2) / (5 / 6))
    assert best_f1("", ["the"]) == 1
    assert best_f1("", ["state"]) == 0


def test_rouge_is_of_the_best_reference_and_of_stems():
    scores = best_rouge("the cats are sleeping", ["nothing here", "the cat sleeps"])
    assert scores["rouge1"] == pytest.approx(2 * (3 / 4) * 1 / (3 / 4 + 1))
    assert scores["rouge2"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert scores["rougeL"] == scores["rouge1"]
