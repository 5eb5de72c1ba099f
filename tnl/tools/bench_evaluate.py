"""`tnl bench evaluate`: requests of benchmarks' shapes, ours beside lm-eval's own adapter, and one very long text.

Both adapters are given the same token ids, the same model and as many tokens a forward pass. Tokenization, which both
would do, is left out. lm-eval's takes the softmax, and sums log-probabilities, in the dtype of the model, unless it is
told otherwise; in bf16 that rounds a score of -345 nats to a multiple of 2. So it is timed as it comes and with a
softmax in fp32, and answers are compared with the latter.
"""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tnl_kernels.record import save

from tnl.errors import ConfigError, UserError
from tnl.evaluation.harness_package import check_harness
from tnl.evaluation.made_requests import ChoiceShape, IdRequest, document_request
from tnl.tools.bench_models import (
    check_json,
    described,
    is_out_of_memory,
    named_config,
    peak_gib,
    random_model,
    seconds,
    start_peak,
)
from tnl.tools.doctor import pick_device

PARTS = ("mmlu", "hellaswag", "document", "accuracy", "long-choices")
SHORT_DOCUMENT = 16384
FP32_TOLERANCE = 1e-4
ACCURACY_TOKENS = 2**17  # that lm-eval's adapter reads of a shape
LONG_CHOICE = 8
# lm-eval's adapter reads a question once for choices of one token, and once for each choice otherwise.
LONG_CHOICES_FRACTION = 4
WARM_QUESTIONS = 96


@dataclass(frozen=True)
class EvaluateWork:
    """How much is measured.

    Attributes:
        subjects, questions: of MMLU; a question of 100 tokens behind five examples of 700, with four choices.
        contexts: of HellaSwag; 80 tokens with four endings of 30.
        document: tokens of the long text.
        batch_tokens: of a forward pass.
    """

    subjects: int = 57
    questions: int = 250
    contexts: int = 4000
    document: int = 2**20
    batch_tokens: int = 2**14

    def shapes(self) -> dict[str, ChoiceShape]:
        """By part."""
        mmlu = ChoiceShape(self.subjects, self.questions, prefix=700, question=100, choices=4, choice=1)
        fewer = max(1, self.subjects // LONG_CHOICES_FRACTION)
        return {
            "mmlu": mmlu,
            "long-choices": replace(mmlu, groups=fewer, choice=LONG_CHOICE),
            "hellaswag": ChoiceShape(1, self.contexts, prefix=0, question=80, choices=4, choice=30),
        }


def bench_evaluate(
    name: str,
    *,
    work: EvaluateWork,
    parts: list[str],
    device: str | None,
    json_file: Path | None,
    report: Callable[[str], None],
) -> dict:
    """Measure and print; returns, and after each part writes to ``json_file``, the figures.

    A part that fails becomes a row that says so, and the others go on.

    Args:
        name: a model of configs/model; its weights are random.
        parts: of `PARTS`.

    Raises:
        ConfigError: see `check_json`, `named_config` and `pick_device`; lm-eval is not installed.
    """
    check_json(json_file)
    check_harness()
    config, where = named_config(name), pick_device(device)
    options = f"--subjects {work.subjects} --questions {work.questions} --contexts {work.contexts} "
    options += f"--document {work.document} --batch-tokens {work.batch_tokens}"
    options += "" if parts == list(PARTS) else f" --only {','.join(parts)}"
    result = described(f"tnl bench evaluate {name} {options}", where)
    result |= {"lm_eval": version("lm_eval"), "work": asdict(work), "rows": []}
    # Its adapter warns of a model that is loaded already.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    report(f"{name} on {result['gpu'] or 'CPU'}, {result['dtype']}, lm-eval {result['lm_eval']}")
    torch.manual_seed(0)
    model = random_model(config, where)
    for part in parts:
        row = {"part": part, "problem": None}
        start_peak(where)
        with _problem_noted(row):
            row |= _measure(part, model, work)
        gc.collect()  # of a failure the traceback holds tensors
        result["rows"].append(row)
        report(line(row))
        # A list of its own, so that it can be a table.
        errors = [{"shape": of["shape"]} | error for of in row.get("shapes", []) for error in of.pop("errors")]
        result |= {"errors": errors} if errors else {}
        save(result, json_file)
    return result


def _measure(part: str, model, work: EvaluateWork) -> dict:
    """The figures of a part."""
    if part == "document":
        return measure_document(model, work)
    if part == "accuracy":
        shapes = work.shapes()
        rows = [{"shape": name} | measure_accuracy(model, shapes[name], work.batch_tokens) for name in shapes]
        return {"tolerance": FP32_TOLERANCE, "shapes": rows}
    return compare_adapters(model, work.shapes()[part], work.batch_tokens)


def _adapters(model, shape: ChoiceShape, batch_tokens: int, **softmax_dtypes: torch.dtype | None) -> dict:
    """Ours, and under each of the other names lm-eval's with that dtype of the softmax."""
    from tnl.evaluation.harness_model import HarnessModel
    from tnl.evaluation.reference_adapter import nominal_tokenizer, reference_adapter

    tokenizer = nominal_tokenizer(model.config.vocab_size)
    size = {"batch_size": _hf_batch_size(shape, batch_tokens), "max_length": shape.longest + 1}
    theirs = {
        name: reference_adapter(model, tokenizer, **size, softmax_dtype=dtype) for name, dtype in softmax_dtypes.items()
    }
    return {"ours": HarnessModel(model, tokenizer, batch_tokens=batch_tokens)} | theirs


def _hf_batch_size(shape: ChoiceShape, batch_tokens: int) -> int:
    return max(1, batch_tokens // shape.longest)


def compare_adapters(model, shape: ChoiceShape, batch_tokens: int) -> dict:
    """All adapters on the same requests: seconds, positions read, and how their answers differ."""
    from tnl.evaluation.reference_adapter import ReadTokens

    requests = shape.requests(model.config.vocab_size)
    dtypes = {"hf": None} if model.dtype == torch.float32 else {"hf": None, "hf_float32": torch.float32}
    row = asdict(shape) | {"questions": shape.groups * shape.questions, "requests": len(requests)}
    row |= {"batch_tokens": batch_tokens, "hf_batch_size": _hf_batch_size(shape, batch_tokens)}
    scores = {}
    for name, adapter in _adapters(model, shape, batch_tokens, **dtypes).items():
        _scores(adapter, requests[: WARM_QUESTIONS * shape.choices])  # compiles the kernels
        start_peak(model.device)
        with ReadTokens(model) as read:
            row[f"{name}_seconds"] = seconds(
                lambda adapter=adapter, name=name: scores.update({name: _scores(adapter, requests)}), model.device
            )
        row[f"{name}_tokens_read"], row[f"{name}_peak_gib"] = read.count, peak_gib(model.device)
        if name != "ours":
            row[f"times_{name}"] = row[f"{name}_seconds"] / row["ours_seconds"]
    *_, exact = scores  # the last of them
    return row | differences(scores["ours"], scores[exact], shape.choices)


def measure_accuracy(model, shape: ChoiceShape, batch_tokens: int) -> dict:
    """How far the adapters' log-likelihoods are from those of the same weights in fp32 with a softmax in fp64, by
    lm-eval's adapter, and in fp32 from each other."""
    passes = 1 if shape.choice == 1 else shape.choices
    fewer = max(1, ACCURACY_TOKENS // (shape.longest * passes * shape.groups))
    shape = replace(shape, questions=min(shape.questions, fewer))
    requests, dtype = shape.requests(model.config.vocab_size), model.dtype

    def scores(**softmax_dtypes: torch.dtype | None) -> dict[str, np.ndarray]:
        adapters = _adapters(model, shape, batch_tokens, **softmax_dtypes)
        return {name: _scores(adapter, requests) for name, adapter in adapters.items()}

    try:
        model.float()
        found = scores(hf=None, exact=torch.float64)
    finally:
        model.to(dtype)  # what they were, bit for bit
    exact = found.pop("exact")
    measured = [("float32", "float32", found)]
    if dtype != torch.float32:
        lower, rounded = str(dtype).removeprefix("torch."), scores(hf=None, hf_float32=torch.float32)
        measured += [
            (lower, "float32", {"ours": rounded["ours"]}),
            (lower, lower, {"hf": rounded["hf"]}),
            (lower, "float32", {"hf": rounded["hf_float32"]}),
        ]
    errors = [
        {"adapter": name, "dtype": kept, "softmax": softmax} | differences(values, exact, shape.choices)
        for kept, softmax, by_adapter in measured
        for name, values in by_adapter.items()
    ]
    between = differences(found["ours"], found["hf"], shape.choices)
    return {"questions": shape.groups * shape.questions} | between | {"errors": errors}


def _scores(adapter, requests: list[IdRequest]) -> np.ndarray:
    """Log-likelihoods fp64 [N]."""
    return np.array([score for score, _ in adapter._loglikelihood_tokens(requests, disable_tqdm=True)])


def differences(ours: np.ndarray, theirs: np.ndarray, choices: int) -> dict:
    """How log-likelihoods [N] differ in nats, and the answers of questions of so many choices.

    Where the answers differ, ``margin_of_unequal`` is the largest distance, by the other adapter, of the two choices
    that were taken: about as much as the differences where it is only rounding.
    """
    a, b = ours.reshape(-1, choices), theirs.reshape(-1, choices)
    rows = np.arange(len(a))
    margins = (b.max(1) - b[rows, a.argmax(1)])[a.argmax(1) != b.argmax(1)]
    return {
        "equal_answers": float((a.argmax(1) == b.argmax(1)).mean()),
        "margin_of_unequal": float(margins.max(initial=0.0)),
        "largest_difference": float(np.abs(a - b).max()),
        "mean_difference": float(np.abs(a - b).mean()),
    }


def measure_document(model, work: EvaluateWork) -> dict:
    """Log-likelihood of one long text, and of one that a transformer would still read whole."""
    from tnl.evaluation.harness_model import HarnessModel
    from tnl.evaluation.reference_adapter import nominal_tokenizer

    vocab_size = model.config.vocab_size
    adapter = HarnessModel(model, nominal_tokenizer(vocab_size), batch_tokens=work.batch_tokens)
    # Both ways to read, with and without a state before.
    _scores(adapter, [document_request(min(work.document, 2 * work.batch_tokens), vocab_size)])
    row = {"tokens": work.document, "short_tokens": min(work.document, SHORT_DOCUMENT)}
    for name, num_tokens in (("short", row["short_tokens"]), ("long", row["tokens"])):
        request = document_request(num_tokens, vocab_size)
        found = {}
        start_peak(model.device)
        row[f"{name}_seconds"] = seconds(
            lambda request=request, found=found: found.update(score=_scores(adapter, [request])[0]), model.device
        )
        row[f"{name}_peak_gib"] = peak_gib(model.device)
        row[f"{name}_nats_per_token"] = -found["score"] / num_tokens
    row["tokens_per_s"] = row["tokens"] / row["long_seconds"]
    has_memory = row["long_peak_gib"] is not None
    return row | {"times_short_peak": row["long_peak_gib"] / row["short_peak_gib"] if has_memory else None}


@contextlib.contextmanager
def _problem_noted(row: dict) -> Iterator[None]:
    """A failure goes into the row. Any kind: the parts before it took minutes on a machine that is gone afterwards."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            row["problem"] = "does not fit into memory"
        else:
            row["problem"] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def line(row: dict) -> str:
    """What is printed of a row."""
    if row["problem"] is not None:
        return f"{row['part']}: {row['problem']}"
    if row["part"] == "document":
        times, short = row["times_short_peak"], f"of {row['short_tokens']:,} tokens"
        memory = "" if times is None else f", peak memory {times:.3f} times that {short}"
        return (
            f"{row['part']}: {row['tokens']:,} tokens in {row['long_seconds']:.2f} s, {row['tokens_per_s']:,.0f} "
            f"tokens/s{memory}"
        )
    if row["part"] == "accuracy":
        return "\n".join(_accuracy_line(shape, row["tolerance"]) for shape in row["shapes"])
    slower = f"{row['times_hf']:.2f} times as long"
    if "hf_float32_seconds" in row:
        slower += f", with a softmax in fp32 {row['times_hf_float32']:.2f} times"
    return (
        f"{row['part']}: {row['questions']:,} questions, {row['ours_seconds']:.2f} s, lm-eval's hf adapter "
        f"{row['hf_seconds']:.2f} s: {slower}; {_answers(row)}"
    )


def _answers(row: dict) -> str:
    text = (
        f"{row['equal_answers']:.2%} equal answers, log-likelihoods at most {row['largest_difference']:.1e} nats apart"
    )
    if row["equal_answers"] < 1:
        text += f", choices that were exchanged at most {row['margin_of_unequal']:.1e}"
    return text


def _accuracy_line(row: dict, tolerance: float) -> str:
    fits = "within" if row["largest_difference"] <= tolerance else "NOT within"
    lines = [f"accuracy, {row['shape']}: {row['questions']:,} questions in fp32: {_answers(row)}, {fits} {tolerance:g}"]
    for error in row["errors"]:
        lines.append(
            f"  {error['adapter']} in {error['dtype']}, softmax in {error['softmax']}: {error['mean_difference']:.1e} "
            f"nats from the softmax in fp64 of the weights in fp32, at most {error['largest_difference']:.1e}; "
            f"{error['equal_answers']:.2%} of its answers"
        )
    return "\n".join(lines)


def chosen_parts(only: str | None) -> list[str]:
    """Of `PARTS`, in their order.

    Args:
        only: names with commas between; None for all.

    Raises:
        ConfigError: a name that is none of them.
    """
    names = [name.strip() for name in only.split(",")] if only else list(PARTS)
    wrong = [name for name in names if name not in PARTS]
    if wrong:
        raise ConfigError(f"--only: no part {wrong[0]!r}; give some of {','.join(PARTS)}")
    return [part for part in PARTS if part in names]
