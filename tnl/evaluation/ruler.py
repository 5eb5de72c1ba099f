"""RULER (arXiv 2404.06654) through lm-eval, which makes its prompts to the length by the model's own tokenizer."""

import contextlib
import io
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import lm_eval
import numpy as np
from lm_eval.tasks import TaskManager
from lm_eval.tasks import ruler as ruler_tasks
from lm_eval.tasks.ruler.common_utils import get_tokenizer

from tnl.errors import ConfigError, did_you_mean
from tnl.evaluation.empty_answers import empty_answers
from tnl.evaluation.harness_model import HarnessModel
from tnl.evaluation.standard_error import standard_error

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)  # that the tasks have a metric for
PACKAGES = "pip install 'lm-eval[ruler]'"
ESSAYS = f"{PACKAGES}, python -m nltk.downloader punkt_tab, and the data set baber/paul_graham_essays of the hub"
# What a task needs beside lm-eval itself.
NEEDS = {
    "niah_single_1": PACKAGES,
    "niah_single_2": ESSAYS,
    "niah_single_3": ESSAYS,
    "niah_multikey_1": ESSAYS,
    "niah_multikey_2": PACKAGES,
    "niah_multikey_3": PACKAGES,
    "niah_multivalue": ESSAYS,
    "niah_multiquery": ESSAYS,
    "ruler_vt": PACKAGES,
    "ruler_cwe": PACKAGES,
    "ruler_fwe": PACKAGES,
    "ruler_qa_squad": f"{PACKAGES}, and a network to read rajpurkar.github.io",
    "ruler_qa_hotpot": f"{PACKAGES}, and a network to read huggingface.co",
}


def check_tasks(names: Sequence[str], lengths: Sequence[int]) -> None:
    """Raise `ConfigError` for what is no task, or no length, of RULER."""
    for name in names:
        if name not in NEEDS:
            raise ConfigError(f"--tasks: no task {name} of RULER, {did_you_mean(name, list(NEEDS))}")
    for length in lengths:
        if length not in LENGTHS:
            raise ConfigError(f"--lengths: {length} is none of RULER's; give some of {', '.join(map(str, LENGTHS))}")


def ruler(
    model,
    tokenizer,
    names: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    report: Callable[[dict], None] = lambda row: None,
    batch_tokens: int = 2**14,
    *,
    allow_empty: bool = False,
) -> list[dict]:
    """A row of figures for each task and length, or with the reason why it has none.

    Args:
        names: of `NEEDS`.
        samples: of a task and length, at most 500.
        report: called with each row.
        allow_empty: count an empty answer as a wrong one; else a row with one has no score.
    """
    adapter = HarnessModel(model, tokenizer, batch_tokens=batch_tokens)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # lm-eval would run code that the model's own folder brings; what is saved here brings none.
        tokenizer.save_pretrained(folder)
        for name in names:
            for length in lengths:
                row = {"task": name, "length": length, "problem": None}
                loaded = _load(name, length, folder, row)
                if loaded is not None:
                    row |= _evaluate(adapter, *loaded, length, samples, allow_empty)
                rows.append(row)
                report(row)
    get_tokenizer.cache_clear()
    return rows


def _load(name: str, length: int, folder: str, row: dict):
    """The task and its manager; None, and the reason in ``row``, where it cannot be made."""
    metadata = {"tokenizer": folder, "max_seq_lengths": [length]}
    manager = TaskManager(include_defaults=False, include_path=str(Path(ruler_tasks.__path__[0])), metadata=metadata)
    # The tasks import packages, read data of nltk and download: what fails is of a dozen types and means one thing.
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # they print a line for every try
            if name == "ruler_vt":
                _check_example(folder)
            task = manager.load([name])["tasks"][name]
        if not all(document["outputs"] for document in task.test_docs()):
            raise ValueError("its text does not fit the length by this tokenizer")
        return task, manager
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        row["problem"] = f"cannot be made ({textwrap.shorten(reason, 160)}); it needs {NEEDS[name]}"
        return None


def _check_example(folder: str) -> None:
    """Raise ValueError where the example of variable tracking, of five sentences, does not fit the 500 tokens that it
    is given less 30 for its answer: lm-eval then looks for a shorter one without end."""
    from lm_eval.tasks.ruler.vt_utils import generate_input_output

    num_tokens = len(get_tokenizer(folder)(generate_input_output(5, 1, 4, is_icl=True)[0]).input_ids)
    if num_tokens > 470:
        raise ValueError(f"its example has {num_tokens} tokens by this tokenizer, which it does not let have over 470")


def _evaluate(adapter: HarnessModel, task, manager: TaskManager, length: int, samples: int, allow_empty: bool) -> dict:
    truncations = adapter.counts.truncations
    results = lm_eval.simple_evaluate(
        adapter, tasks=[task], task_manager=manager, limit=samples, bootstrap_iters=0, log_samples=True
    )
    (logged,) = results["samples"].values()
    empty = len(empty_answers(logged).documents)
    row = {"samples": len(logged), "empty_answers": empty, "truncations": adapter.counts.truncations - truncations}
    if empty and not allow_empty:
        return row | {
            "problem": f"the answers to {empty} of {len(logged)} prompts are empty; --allow-empty counts them"
        }
    scores = [sample[str(length)] for sample in logged]
    return row | {"score": float(np.mean(scores)), "score_stderr": standard_error(scores)}
