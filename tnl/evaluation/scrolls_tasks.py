"""SCROLLS (arXiv 2201.03533) in lm-eval's schema, with the prompts that lm-eval gives it and metrics computed here.

lm-eval's own classes download a metric from the hub and run it; here none of the hub's code is run.
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from functools import cache, partial

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from rouge_score.rouge_scorer import RougeScorer

PATH = "tau/scrolls"
ARCHIVE = "https://huggingface.co/datasets/tau/scrolls/resolve/main"
VERSION = 2.0
ROUGE = ("rouge1", "rouge2", "rougeL")
CHOICE = re.compile(r" *\([A-D]\) *")
LABELS = ["Not mentioned", "Entailment", "Contradiction"]
UNTIL_LINE = {"until": ["\n"], "do_sample": False}


# Metrics, 0 to 1.


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(ROUGE, use_stemmer=True)


def best_rouge(prediction: str, references: list[str]) -> dict[str, float]:
    """ROUGE F-measures, each against the reference that it is largest for, words reduced to their stems."""
    scores = [_scorer().score(reference, prediction) for reference in references]
    return {kind: max(score[kind].fmeasure for score in scores) for kind in ROUGE}


def _words(text: str) -> list[str]:
    """Words without case, punctuation and articles, as SQuAD compares them."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(prediction: str, reference: str) -> float:
    found, wanted = _words(prediction), _words(reference)
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def best_f1(prediction: str, references: list[str]) -> float:
    """F-measure over words against the reference that it is largest for (SQuAD, arXiv 1606.05250)."""
    return max(_f1(prediction, reference) for reference in references)


# Documents.


def _with_all_outputs(rows: datasets.Dataset) -> list[dict]:
    """One document of each id, with the outputs of all its rows."""
    found: dict[str, dict] = {}
    for row in rows:
        document = found.setdefault(row["id"], {"id": row["id"], "input": row["input"], "outputs": []})
        document["outputs"].append(row["output"])
    return list(found.values())


def _split_question(document: dict) -> dict:
    """The question stands before the text, an empty line between them."""
    question, _, text = document["input"].partition("\n\n")
    return document | {"question": question, "text": text}


def _with_yes_or_no(document: dict) -> dict:
    return document | {"yes_or_no": all(_words(output) in (["yes"], ["no"]) for output in document["outputs"])}


def _with_choices(document: dict) -> dict:
    """The choices (A) to (D) stand before the text."""
    whole = document["text"]
    end = whole.find("\n\n", whole.find("(D)"))
    choices = [" ".join(choice.split()) for choice in CHOICE.split(whole[:end])[1:]]
    answer = choices.index(" ".join(document["outputs"][0].split()))
    return document | {"text": whole[end:].strip(), "choices": choices, "answer": answer}


def _with_label(document: dict) -> dict:
    return document | {"answer": LABELS.index(document["outputs"][0])}


def _prepared(rows: datasets.Dataset, steps: tuple[Callable[[dict], dict], ...]) -> datasets.Dataset:
    documents = _with_all_outputs(rows)
    for step in steps:
        documents = [step(document) for document in documents]
    return datasets.Dataset.from_list(documents)


# Tasks.


def _rouge_results(document: dict, results: list[str]) -> dict[str, float]:
    return best_rouge(results[0], document["outputs"])


def _f1_results(document: dict, results: list[str]) -> dict[str, float]:
    return {"f1": best_f1(results[0], document["outputs"])}


def _config(name: str, *steps: Callable[[dict], dict], metrics: tuple[str, ...], **more) -> dict:
    return {
        "dataset_path": PATH,
        "dataset_name": name,
        "validation_split": "validation",
        "process_docs": partial(_prepared, steps=steps),
        "output_type": "generate_until",
        "generation_kwargs": dict(UNTIL_LINE),
        "doc_to_text": "{{text}}\n\nQuestion: {{question}}\nAnswer:",
        "doc_to_target": "{{outputs[0]}}",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
        "metadata": {"version": VERSION},
    } | more


def _summary(name: str) -> dict:
    text = "{{input}}\n\nQuestion: What is a summary of the preceding text?\nAnswer:"
    return _config(name, metrics=ROUGE, doc_to_text=text, process_results=_rouge_results)


def _choices(name: str, *steps: Callable[[dict], dict], **more) -> dict:
    more = {"output_type": "multiple_choice", "doc_to_target": "answer", "generation_kwargs": None} | more
    return _config(name, _split_question, *steps, metrics=("acc", "acc_norm"), **more)


class Qasper(ConfigurableTask):
    """Questions about papers: those of yes and no by log-likelihood, the others by generation."""

    def __init__(self, config: dict | None = None):
        steps = (_split_question, _with_yes_or_no)
        super().__init__(config=_config("qasper", *steps, metrics=("f1",), process_results=_qasper_results))

    def construct_requests(self, doc: dict, ctx: str, **kwargs) -> list[Instance] | Instance:
        """What the model is asked about one document."""
        kwargs = {"metadata": kwargs["metadata"]}
        if not doc["yes_or_no"]:
            return Instance("generate_until", doc, (ctx, dict(UNTIL_LINE)), 0, **kwargs)
        return [Instance("loglikelihood", doc, (ctx, answer), i, **kwargs) for i, answer in enumerate((" yes", " no"))]


def _qasper_results(document: dict, results: list) -> dict[str, float]:
    if document["yes_or_no"]:
        prediction = "yes" if results[0] > results[1] else "no"
    else:
        prediction = results[0] if results[0].strip() else "Unanswerable"
    return {"f1": best_f1(prediction, document["outputs"])}


def archive_files(name: str) -> dict[str, str]:
    """Addresses of the labelled splits in the archive on the hub, as `datasets` opens them."""
    return {split: f"zip://{name}/{split}.jsonl::{ARCHIVE}/{name}.zip" for split in ("train", "validation")}


# Name of the data set -> the task's configuration in lm-eval's schema.
SCROLLS_TASKS: dict[str, Callable[[], dict]] = {
    "gov_report": lambda: _summary("gov_report"),
    "summ_screen_fd": lambda: _summary("summ_screen_fd"),
    "qmsum": lambda: _config("qmsum", _split_question, metrics=ROUGE, process_results=_rouge_results),
    "qasper": lambda: {"class": Qasper, "dataset_path": PATH, "dataset_name": "qasper"},
    "narrative_qa": lambda: _config("narrative_qa", _split_question, metrics=("f1",), process_results=_f1_results),
    "quality": lambda: _choices("quality", _with_choices, doc_to_choice="choices"),
    "contract_nli": lambda: _choices(
        "contract_nli",
        _with_label,
        doc_to_choice=LABELS,
        doc_to_text="{{text}}\n\nHypothesis: {{question}}\nConclusion:",
    ),
}
