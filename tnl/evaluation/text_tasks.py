"""Texts for perplexity that lm-eval has no task for."""

from collections.abc import Callable


def _wikitext103() -> dict:
    """lm-eval's wikitext, which is WikiText-2, with the data of WikiText-103."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    return {
        "dataset_path": "EleutherAI/wikitext_document_level",
        "dataset_name": "wikitext-103-raw-v1",
        "output_type": "loglikelihood_rolling",
        "training_split": "train",
        "validation_split": "validation",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": wikitext_detokenizer,
        "process_results": process_results,
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        "metadata": {"version": 2.0},
    }


# Name -> the task's configuration in lm-eval's schema.
TEXT_TASKS: dict[str, Callable[[], dict]] = {"wikitext103": _wikitext103}
