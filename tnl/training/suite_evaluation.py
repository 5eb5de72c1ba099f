"""Benchmarks inside a training run: a small suite of lm-eval on the model as it is, divided among the ranks."""

import contextlib
import io
import random

import numpy as np
import torch

from tnl.errors import DataError, NonFiniteError
from tnl.evaluation.harness_package import check_harness
from tnl.evaluation.suite_command import SuiteOptions, load_suite, wanted_tasks
from tnl.generation.load import load_tokenizer
from tnl.training.run_folder import TOKENIZER
from tnl.training.settings import RunSettings, TrainSettings

MAX_BATCH_TOKENS = 2**14
# Optimizer and gradients stay where they are meanwhile.
MAX_STATE_BYTES = 2**30


class SuiteEvaluation:
    """The tasks of ``evaluation.suite`` and ``evaluation.tasks``, with their data, read once."""

    def __init__(self, settings: RunSettings):
        """
        Raises:
            ConfigError: no lm-eval, no such suite, task or metric, or a task that runs what the model writes.
            DataError: data of a task are not here, or wrong.
        """
        check_harness()
        from tnl.evaluation.suite_run import plan
        from tnl.evaluation.task_data import TaskData
        from tnl.evaluation.task_library import TaskLibrary

        wanted = settings.evaluation
        self._output, self._limit = settings.output, wanted.limit
        self._batch_tokens = batch_tokens(settings.train)
        self._suite = None if wanted.suite is None else load_suite(wanted.suite)
        # A model that has learned little may well end at once.
        options = SuiteOptions(suite=wanted.suite, tasks=wanted.tasks, output=settings.output, allow_empty=True)
        self._tasks = plan(
            TaskLibrary(TaskData(wanted.data_dir)), wanted_tasks(self._suite, options), confirm_unsafe=False
        )
        if self._tasks.missing:
            raise DataError("evaluation.suite: " + "; ".join(self._tasks.missing.values()))
        self._tokenizer = None

    def evaluate(self, engine) -> dict[str, float]:
        """Scores, and their standard errors, by name; on all ranks together. A resumed run gets the same, and the
        random state of training is left alone.

        Args:
            engine: a DeepSpeed engine around a `TransnormerForCausalLM` that is whole on every rank.

        Raises:
            NonFiniteError: the model's logits are not finite, or a perplexity is beyond all numbers.
        """
        from tnl.evaluation.harness_model import HarnessModel
        from tnl.evaluation.suite_run import measure

        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(str(self._output / TOKENIZER))
        model = engine.module
        was_training = model.training
        model.eval()
        before = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
                adapter = HarnessModel(
                    model, self._tokenizer, batch_tokens=self._batch_tokens, max_state_bytes=MAX_STATE_BYTES
                )
                with contextlib.redirect_stderr(io.StringIO()):  # bars, which would tear that of the run
                    measured = measure(adapter, self._tasks, limit=self._limit, confirm_unsafe=False, prompts=None)
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            model.train(was_training)
        return self._named(measured)

    def _named(self, measured) -> dict[str, float]:
        from tnl.evaluation.suite_tables import find_metric

        found: dict[str, float] = {}

        def add(name: str, score) -> None:
            found[name] = score.value
            if score.stderr is not None:
                found[f"{name} stderr"] = score.stderr

        if self._suite is None:
            for task, scores in measured.scores.items():
                for score in scores:
                    add(f"{task} {score.metric}", score)
            return found
        for task in self._suite.tasks:
            if task.task in measured.scores:
                scores = {score.metric: score for score in measured.scores[task.task]}
                add(task.column, scores[find_metric(task.metric, list(scores), task.task)])
        return found


def batch_tokens(train: TrainSettings) -> int:
    """Tokens of a forward pass: no more than a pass of training holds on a rank."""
    length = train.segment_length or train.sequence_length // train.sequence_parallel
    return min(MAX_BATCH_TOKENS, train.micro_batch_size * length)


def open_suite(settings: RunSettings) -> SuiteEvaluation | None:
    """What ``evaluation`` asks for; None where it asks for no benchmarks. Raises as `SuiteEvaluation`."""
    wanted = settings.evaluation
    return SuiteEvaluation(settings) if wanted.suite is not None or wanted.tasks else None


def scores_or_problem(suite: SuiteEvaluation, engine) -> tuple[dict[str, float], str | None]:
    """The scores; or none, and what is wrong with them, where the model is not finite: whether training goes on is not
    for benchmarks to say."""
    try:
        return suite.evaluate(engine), None
    except NonFiniteError as error:
        return {}, str(error)
