"""RULER (arXiv 2404.06654) through lm-eval, which makes its prompts to the length by the model's own tokenizer."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import lm_eval
import numpy as np
from lm_eval.tasks import TaskManager
from lm_eval.tasks import ruler as ruler_tasks
from lm_eval.tasks.ruler.common_utils import get_tokenizer

from tnl.errors import ConfigError, did_you_mean
from tnl.evaluation.harness_model import HarnessModel
from tnl.evaluation.standard_error import standard_error

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)  # that the tasks have a metric for
NIAH = "pip install wonderwords nltk && python -m nltk.downloader punkt_tab"
ESSAYS = f"{NIAH}; and the dataset baber/paul_graham_essays in the datasets cache"
# What a task needs beside lm-eval; the others make their text themselves.
NEEDS = {
    "niah_single_1": NIAH,
    "niah_single_2": ESSAYS,
    "niah_single_3": ESSAYS,
    "niah_multikey_1": ESSAYS,
    "niah_multikey_2": NIAH,
    "niah_multikey_3": NIAH,
    "niah_multivalue": ESSAYS,
    "niah_multiquery": ESSAYS,
    "ruler_vt": "",
    "ruler_cwe": "pip install wonderwords",
    "ruler_fwe": "pip install scipy",
    "ruler_qa_squad": "a network, through which it reads rajpurkar.github.io",
    "ruler_qa_hotpot": "a network, through which it reads curtis.ml.cmu.edu",
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
) -> list[dict]:
    """A row of figures for each task and length, or with the reason why it has none.

    Args:
        names: of `NEEDS`.
        samples: of a task and length, at most 500.
        report: called with each row.
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
                    row |= _evaluate(adapter, *loaded, length, samples)
                rows.append(row)
                report(row)
    get_tokenizer.cache_clear()
    return rows


def _load(name: str, length: int, folder: str, row: dict):
    """The task and its manager; None, and the reason in ``row``, where its data cannot be had."""
    metadata = {"tokenizer": folder, "max_seq_lengths": [length]}
    manager = TaskManager(
        include_defaults=False, include_path=str(Path(ruler_tasks.__path__[0])), metadata=metadata
    )  # fmt: skip
    # The tasks import packages, read data of nltk and download: what fails is of a dozen types and means one thing.
    try:
        return manager.load([name])["tasks"][name], manager
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        cure = f"; it needs: {NEEDS[name]}" if NEEDS[name] else ""
        row["problem"] = f"cannot be made ({reason}){cure}"
        return None


def _evaluate(adapter: HarnessModel, task, manager: TaskManager, length: int, samples: int) -> dict:
    results = lm_eval.simple_evaluate(
        adapter, tasks=[task], task_manager=manager, limit=samples, bootstrap_iters=0, log_samples=True
    )
    (logged,) = results["samples"].values()
    scores = [sample[str(length)] for sample in logged]
    return {
        "samples": len(scores),
        "score": float(np.mean(scores)),
        "score_stderr": standard_error(scores),
        "truncations": adapter.counts.truncations,
    }
