"""`tnl compare` of two results of `tnl evaluate`: paired differences, their intervals, and what is refused."""

import json
import math

import numpy as np
import pytest

from tests.test_report import is_png
from tnl.errors import ConfigError, DataError
from tnl.tools import score_comparison
from tnl.tools.score_comparison import MEAN, compare_scores


def sample(index: int, scores: dict, **changes) -> dict:
    asked = {"doc_id": index, "doc_hash": f"h{index}", "filter": "none", "context": f"q{index}", "target": "1"}
    return asked | {"answers": [index], "scores": scores} | changes


def result(folder, tasks: dict[str, list[dict]], better: bool | None = True):
    """A folder as `tnl evaluate` leaves it."""
    (folder / "prompts").mkdir(parents=True)
    details = []
    for task, samples in tasks.items():
        lines = "".join(json.dumps(one) + "\n" for one in samples)
        (folder / "prompts" / f"{task}.jsonl").write_text(lines)
        metrics = {metric for one in samples for metric in one["scores"]}
        details += [{"task": task, "metric": metric, "higher_is_better": better} for metric in sorted(metrics)]
    (folder / "scores.json").write_text(json.dumps({"details": details}))
    return folder


def answers(values) -> list[dict]:
    return [sample(i, {"acc": float(value)}, texts=[f"{value} "]) for i, value in enumerate(values)]


def test_differences_are_paired(tmp_path):
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 2, (2, 50))
    first, second = result(tmp_path / "a", {"piqa": answers(a)}), result(tmp_path / "b", {"piqa": answers(b)})
    (one,), notes = compare_scores([first, second / "scores.json"], tmp_path / "out")
    assert notes == []
    assert (one.task, one.metric, one.samples) == ("piqa", "acc", 50)
    assert (one.first, one.second) == pytest.approx((a.mean(), b.mean()))
    assert one.difference == pytest.approx((b - a).mean())
    assert one.stderr == pytest.approx((b - a).std(ddof=1) / math.sqrt(50))
    assert one.interval == pytest.approx((one.difference - 1.96 * one.stderr, one.difference + 1.96 * one.stderr))
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["rows"][0]["interval_95"] == list(one.interval)
    assert is_png(tmp_path / "out" / "comparison.png")


def test_intervals_hold_the_true_difference_as_often_as_they_say(tmp_path, monkeypatch):
    """Answers that depend on how hard the question is for both: paired intervals are right, and narrower."""
    monkeypatch.setattr(score_comparison, "_draw", lambda *arguments: None)  # a quarter of a second each
    draw = np.random.default_rng(1)
    hits, widths = [], []
    for i in range(60):
        ease = draw.random(300)
        a, b = draw.random(300) < ease, draw.random(300) < np.clip(ease + 0.1, 0, 1)
        folders = [result(tmp_path / f"{name}{i}", {"t": answers(x)}) for name, x in (("a", a), ("b", b))]
        (one,), _ = compare_scores(folders, tmp_path / "out")
        hits.append(one.interval[0] <= 0.095 <= one.interval[1])  # the mean of min(u + 0.1, 1) - u
        widths.append(one.stderr / math.sqrt(a.var() / 300 + b.var() / 300))
    assert 0.85 <= np.mean(hits) <= 1
    assert np.mean(widths) < 0.9


def test_the_mean_over_tasks_counts_tasks_alike(tmp_path):
    first = result(tmp_path / "a", {"x": answers([0, 0, 1, 1]), "y": answers([0, 1]), "only": answers([1])})
    second = result(tmp_path / "b", {"x": answers([1, 0, 1, 1]), "y": answers([1, 0])})
    found, notes = compare_scores([first, second], tmp_path / "out")
    mean, x, y = found
    assert (mean.task, mean.samples) == (MEAN, 6)
    assert mean.difference == pytest.approx((0.25 + 0) / 2)
    assert mean.stderr == pytest.approx(math.hypot(x.stderr, y.stderr) / 2)
    assert notes == [f"only: measured in {first} only, left out"]


def test_losses_of_texts_are_compared_per_word(tmp_path):
    def texts(sums):
        return [
            sample(i, {"word_perplexity": [value, count], "odd": {"a": 1}})
            for i, (value, count) in enumerate(zip(sums, (10, 30), strict=True))
        ]

    first, second = result(tmp_path / "a", {"w": texts([-20, -90])}), result(tmp_path / "b", {"w": texts([-10, -80])})
    (one,), notes = compare_scores([first, second], tmp_path / "out")
    assert one.metric == "word_perplexity: log-likelihood"
    assert (one.first, one.second, one.difference) == pytest.approx((-110 / 40, -90 / 40, 20 / 40))
    residuals = np.array([10 - 0.5 * 10, 10 - 0.5 * 30])
    assert one.stderr == pytest.approx(residuals.std(ddof=1) / math.sqrt(2) / 20)
    assert notes == ["w: odd is no mean over samples, left out"]


def test_two_models_that_were_asked_other_things_are_refused(tmp_path):
    first = result(tmp_path / "a", {"t": answers([0, 1])})
    fewer = result(tmp_path / "b", {"t": answers([0])})
    with pytest.raises(DataError, match=r"t: 2 answers in .*, 1 in .*, document 1 is in one of them only"):
        compare_scores([first, fewer], tmp_path / "out")
    other = result(tmp_path / "c", {"t": [*answers([0]), sample(1, {"acc": 1.0}, context="an example\nq1")]})
    with pytest.raises(DataError, match=r"document 1 was not asked in the same way .context differs"):
        compare_scores([first, other], tmp_path / "out")
    with pytest.raises(ConfigError, match="no task was measured in both"):
        compare_scores([first, result(tmp_path / "d", {"u": answers([0])})], tmp_path / "out")
    with pytest.raises(ConfigError, match="one of them is given twice"):
        compare_scores([first, first / "scores.json"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_which_is_better(tmp_path, tnl_command):
    first = result(tmp_path / "a", {"t": answers([0] * 40 + [1] * 10)})
    second = result(tmp_path / "b", {"t": answers([0] * 20 + [1] * 30)})
    code, out, err = tnl_command("compare", first, second, "--output", tmp_path / "out")
    assert code == 0, err
    assert "t, acc  0.2000 and 0.6000, +0.4000 [+0.2628, +0.5372], 50 samples: the second is better" in out


def test_bad_input_is_one_message(tmp_path, tnl_command):
    first = result(tmp_path / "a", {"t": answers([0, 1])})
    (tmp_path / "run").mkdir()
    code, _, err = tnl_command("compare", first, tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "compare results with results, or runs with runs" in err
    (first / "prompts" / "t.jsonl").write_text('{"doc_id": 1}\n')
    code, _, err = tnl_command("compare", first, result(tmp_path / "b", {"t": answers([0, 1])}))
    assert (code, err.count("\n")) == (65, 1)
    assert "t.jsonl: damaged" in err
