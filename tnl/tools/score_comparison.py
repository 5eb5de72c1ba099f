"""Two models on the same benchmark questions: differences of their scores, sample by sample.

Both answer the same questions, so that what makes a question hard for both falls out of the difference: its standard
error is that of the mean of the paired differences (Miller, Adding Error Bars to Evals, arXiv 2411.00640). The interval
of 95 % is the normal one: the difference plus and minus 1.96 standard errors.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tnl.errors import CannotWriteError, ConfigError, DataError
from tnl.evaluation.standard_error import ratio
from tnl.evaluation.suite_command import PROMPTS
from tnl.files import write_atomically
from tnl.tools.figures import BLUE, GREY, ORANGE, STYLE, save_figure

SCORES = "scores.json"
NORMAL_95 = 1.96
MEAN = "mean over tasks"
# What a model said and how that was scored; the rest of a line is what it was asked.
ANSWERED = ("answers", "texts", "scores")


@dataclass(frozen=True)
class Difference:
    """Of the second model from the first, on one metric of one task or, for `MEAN`, of all tasks that have it.

    Attributes:
        first, second: the means of both.
        stderr: of the difference; None of a single sample.
        samples: that were compared.
        higher_is_better: None where it is not known.
    """

    task: str
    metric: str
    first: float
    second: float
    difference: float
    stderr: float | None
    samples: int
    higher_is_better: bool | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """In which the true difference lies with 95 %."""
        if self.stderr is None:
            return None
        return self.difference - NORMAL_95 * self.stderr, self.difference + NORMAL_95 * self.stderr

    @property
    def is_told_apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def row(self) -> dict:
        """Figures as JSON values."""
        return asdict(self) | {"interval_95": self.interval, "is_told_apart": self.is_told_apart}


def is_result(path: Path) -> bool:
    """Whether `tnl evaluate --suite` or ``--tasks`` wrote this folder, or file of scores."""
    return (path.is_dir() and (path / SCORES).is_file()) or (path.is_file() and path.name == SCORES)


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders, as many as tell them apart.

    Raises:
        ConfigError: one is given twice.
    """
    whole = [folder.resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        raise ConfigError(f"{', '.join(map(str, folders))}: one of them is given twice; compare different ones")
    for count in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-count:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    raise AssertionError(whole)


def compare_scores(paths: Sequence[Path], folder: Path) -> tuple[list[Difference], list[str]]:
    """Write ``comparison.json`` and ``comparison.png`` to ``folder``; returns the differences, those over all tasks
    first, and notes on what was left out.

    Args:
        paths: two result folders of `tnl evaluate`, or the files of scores in them.

    Raises:
        ConfigError: not two, one given twice, or they have no task in common.
        DataError: a file is missing or damaged, or the two models were asked different things.
        CannotWriteError: the folder cannot be written to.
    """
    if len(paths) != 2:
        raise ConfigError(f"{len(paths)} results of tnl evaluate given; compare two of them")
    folders = [path if path.is_dir() else path.parent for path in paths]
    names = distinct_names(folders)
    details = [_details(each / SCORES) for each in folders]
    tasks = [task for task in details[0] if task in details[1]]
    if not tasks:
        raise ConfigError(
            f"{folders[0]} and {folders[1]}: no task was measured in both; evaluate them on the same --suite or --tasks"
        )
    notes = [
        f"{task}: measured in {folders[i]} only, left out"
        for i in range(2)
        for task in details[i]
        if task not in details[1 - i]
    ]
    found: list[Difference] = []
    for task in tasks:
        first, second = (_samples(each / PROMPTS / f"{task}.jsonl") for each in folders)
        _check_same(task, first, second, folders)
        more, left = _differences(task, first, second, details[0][task])
        found += more
        notes += [f"{task}: {metric} is no mean over samples, left out" for metric in sorted(left)]
    found = _means(found) + found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _draw(found, names, folder / "comparison.png")
        result = {"first": str(folders[0]), "second": str(folders[1]), "rows": [one.row() for one in found]}
        write_atomically(folder / "comparison.json", json.dumps(result | {"notes": notes}, indent=1) + "\n")
    except OSError as error:
        raise CannotWriteError(
            f"{folder}: cannot write the comparison: {error}; free the disk or the folder"
        ) from error
    return found, notes


def _details(file: Path) -> dict[str, dict[str, bool | None]]:
    """The tasks of a result, with their metrics and whether more of each is better."""
    found: dict[str, dict[str, bool | None]] = {}
    try:
        for score in json.loads(file.read_bytes())["details"]:
            found.setdefault(score["task"], {})[score["metric"]] = score["higher_is_better"]
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; give a folder that tnl evaluate --suite wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: no scores of tnl evaluate ({type(error).__name__}: {error}); evaluate again"
        ) from None
    return found


def _samples(file: Path) -> dict[tuple, tuple[dict, dict]]:
    """What was asked, and how the answer was scored, by document and filter."""
    found = {}
    try:
        for line in file.read_bytes().splitlines():
            sample = json.loads(line)
            asked = {key: value for key, value in sample.items() if key not in ANSWERED}
            found[sample["doc_id"], sample["filter"]] = asked, dict(sample["scores"])
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; evaluate again into that folder") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: damaged ({type(error).__name__}: {error}); evaluate again into that folder") from None
    return found


def _check_same(task: str, first: dict, second: dict, folders: Sequence[Path]) -> None:
    """Refuse two models that were asked different things."""
    cure = "evaluate both with the same data and options"
    if first.keys() != second.keys():
        (document, _), *_ = sorted(first.keys() ^ second.keys(), key=str)
        raise DataError(
            f"{task}: {len(first)} answers in {folders[0]}, {len(second)} in {folders[1]}, document {document} is in "
            f"one of them only; {cure}"
        )
    for key, (asked, _) in first.items():
        other = second[key][0]
        if asked != other:
            differing = next(name for name in [*asked, *other] if asked.get(name) != other.get(name))
            raise DataError(f"{task}: document {key[0]} was not asked in the same way ({differing} differs); {cure}")


def _differences(task: str, first: dict, second: dict, better: dict[str, bool | None]) -> tuple[list[Difference], set]:
    """Of every metric that is a mean over samples, and the names of the others."""
    values: dict[tuple[str, str], list[tuple]] = {}
    for key, (_, scores) in first.items():
        others = second[key][1]
        for metric in scores.keys() & others.keys():
            values.setdefault((metric, key[1]), []).append((scores[metric], others[metric]))
    found, left = [], set()
    for (metric, kept), pairs in sorted(values.items()):
        name = metric if kept == "none" else f"{metric} ({kept})"
        sums, counts = _columns(pairs)
        if sums is None:
            left.add(name)
            continue
        # What lm-eval makes a perplexity of are log-likelihoods.
        is_likelihood = metric == "perplexity" or counts is not None
        counts = np.ones(len(pairs)) if counts is None else counts
        difference, error = ratio(sums[:, 1] - sums[:, 0], counts)
        means = [float(sums[:, i].sum() / counts.sum()) for i in range(2)]
        label = f"{name}: log-likelihood" if is_likelihood else name
        known = True if is_likelihood else better.get(name)
        found.append(Difference(task, label, *means, difference, error, len(pairs), known))
    return found, left


def _columns(pairs: list[tuple]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Scores of both models [N, 2], and what they are divided by [N], the same for both; None for what is not there."""
    if all(isinstance(value, int | float) for pair in pairs for value in pair):
        return np.array(pairs, dtype=np.float64), None
    if not all(isinstance(value, list) and len(value) == 2 for pair in pairs for value in pair):
        return None, None
    columns = np.array(pairs, dtype=np.float64)  # [N, 2, (sum, count)]
    if (columns[:, 0, 1] != columns[:, 1, 1]).any():
        return None, None
    return columns[:, :, 0], columns[:, 0, 1]


def _means(found: Sequence[Difference]) -> list[Difference]:
    """Over the tasks, each counted alike, of the metrics that several of them have."""
    metrics: dict[str, list[Difference]] = {}
    for one in found:
        metrics.setdefault(one.metric, []).append(one)
    return [
        Difference(
            MEAN,
            metric,
            float(np.mean([one.first for one in some])),
            float(np.mean([one.second for one in some])),
            float(np.mean([one.difference for one in some])),
            None
            if any(one.stderr is None for one in some)
            else float(np.sqrt(np.sum([one.stderr**2 for one in some])) / len(some)),
            sum(one.samples for one in some),
            some[0].higher_is_better,
        )
        for metric, some in metrics.items()
        if len(some) > 1
    ]


def lines(found: Sequence[Difference]) -> list[tuple[str, str]]:
    """What is printed of each difference."""
    shown = []
    for one in found:
        interval = "" if one.interval is None else f" [{one.interval[0]:+.4f}, {one.interval[1]:+.4f}]"
        text = f"{one.first:.4f} and {one.second:.4f}, {one.difference:+.4f}{interval}, {one.samples:,} samples"
        shown.append((f"{one.task}, {one.metric}", f"{text}: {_verdict(one)}"))
    return shown


def _verdict(one: Difference) -> str:
    if not one.is_told_apart:
        return "not told apart"
    if one.higher_is_better is None:
        return f"the {'second' if one.difference > 0 else 'first'} is higher"
    return f"the {'second' if (one.difference > 0) == one.higher_is_better else 'first'} is better"


def _draw(found: Sequence[Difference], names: Sequence[str], path: Path) -> None:
    """Differences with their intervals, one below the other."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    places = np.arange(len(found))[::-1]
    differences = np.array([one.difference for one in found])
    reach = np.array([NORMAL_95 * (one.stderr or 0.0) for one in found])
    colors = [GREY if not one.is_told_apart else BLUE if one.difference > 0 else ORANGE for one in found]
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 1.6 + 0.3 * len(found)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=GREY, lw=1)
        axes.hlines(places, differences - reach, differences + reach, colors=colors)
        axes.scatter(differences, places, c=colors, s=18, zorder=3)
        axes.set_yticks(places, [f"{one.task}, {one.metric}" for one in found])
        axes.set(title=f"{names[1]} minus {names[0]}", xlabel="difference, with its interval of 95 %")
        save_figure(figure, path)
