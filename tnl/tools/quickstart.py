"""The main job on one machine: text -> tokenizer -> shards -> pretraining -> evaluation -> three continuations ->
summary."""

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np

from tnl import config as configuration
from tnl.data.prepare import prepare
from tnl.data.settings import PrepareSettings
from tnl.data.shard_format import ShardIndex
from tnl.data.shards import ShardSet
from tnl.data.sources import local_size
from tnl.data.tokenizer import Tokenizer
from tnl.errors import EXIT_PREEMPTED, ConfigError, DataError, UserError
from tnl.tools.report import read_metrics, report
from tnl.tools.tables import format_rows

CODE_PROMPTS = ("import os\nimport ", "def read_file(path", "class Parser:\n    def __init__(self")
PROMPT_WORDS = 6
MANY_DOCUMENTS = 500
_NAME_CHARACTERS = 40
SUMMARY = "summary.txt"


class StoppedError(UserError):
    """The training was asked to stop before its last step."""

    exit_code = EXIT_PREEMPTED


def quickstart(
    *,
    text: Path | None,
    dataset: str | None,
    folder: Path,
    config: str,
    overrides: list[str],
    fresh: bool = False,
    on_bad: str | None = None,
) -> Path:
    """Run the whole chain, each part reusing what an earlier run left, and return the run folder.

    Args:
        text: folder of text files; None with ``dataset`` None takes the sources of Python's standard library.
        dataset: name of a dataset of the Hugging Face hub.
        folder: where ``data/`` and ``runs/`` are written.
        config: training configuration; its ``data.shards`` and ``output`` are taken relative to ``folder``.
        overrides: dotted overrides of it.
        fresh: prepare the text and train anew; an older run is moved aside.
        on_bad: ``skip`` leaves out malformed texts, ``error``, the default, ends with the first of them.
    """
    from tnl.training.settings import PretrainSettings

    if text is not None and dataset is not None:
        raise ConfigError("--text and --dataset: give one of them")
    name, source = _source(text, dataset, on_bad)
    folder = folder.expanduser()
    places = {"data": {"shards": str(folder / "data" / name)}, "output": str(folder / "runs" / name)}
    settings = configuration.load(PretrainSettings, config, overrides, places)

    print("1/5 data", flush=True)
    shards_folder = prepare(_prepare_settings(source, settings), report=print, fresh=fresh)
    splits = ShardIndex.read(shards_folder).splits
    if not (splits["train"] and splits["heldout"]):
        raise DataError(
            f"{source['path']}: too few documents to set some aside for evaluation; one file is one document, so split "
            "the text into 30 files or more and start again with --fresh"
        )

    print("2/5 training", flush=True)
    from tnl.training.pretrain import pretrain

    if pretrain(settings, fresh=fresh) == "preempted":
        raise StoppedError(
            f"{settings.output}: stopped before the last step; start the same command again, without --fresh, to go on"
        )

    print("3/5 evaluation", flush=True)
    from tnl.evaluation.command import evaluate_shards
    from tnl.training.export import resolve_model

    model = resolve_model(str(settings.output))
    result = evaluate_shards(model, shards_folder)
    heldout = ShardSet.open(shards_folder, "heldout")
    ngrams = _ngram_losses(settings, shards_folder, heldout)

    print("4/5 generation", flush=True)
    samples = _generate(model, _prompts(source, shards_folder, heldout))

    print("5/5 summary", flush=True)
    plots = report(settings.output).folder
    train = read_metrics(settings.output).train
    rate = train["tokens"][-1] / np.nansum(train["step_time_s"])
    summary = _summary(settings, result, ngrams, rate, plots, shards_folder)
    (settings.output / SUMMARY).write_text(summary + "\n\n" + "\n\n".join(samples) + "\n", encoding="utf-8")
    print(summary)
    return settings.output


def _source(text: Path | None, dataset: str | None, on_bad: str | None) -> tuple[str, dict]:
    """Name of the data and of the run, and the section ``source``."""
    if text is None and dataset is None:
        if on_bad is not None:
            raise ConfigError("--on-bad: is for a text of yours; give --text or --dataset too")
        return "quickstart", {"kind": "stdlib"}
    # Who asks to skip has said so for all of them; how many they were is reported.
    bad = {} if on_bad is None else {"on_bad": on_bad, "max_bad_fraction": 1.0}
    if text is not None:
        text = text.expanduser()
        source = {"kind": "text", "path": str(text), "suffixes": [".txt", ".md", ".rst", ".py"], **bad}
        return _name(text.absolute().name, os.path.realpath(text)), source
    source = {"kind": "dataset", "path": dataset, "streaming": True, "max_bytes": 30_000_000, **bad}
    return _name(dataset, dataset), source


def _name(shown: str, full: str) -> str:
    """A file name of what is shown and a hash of what it is: two folders of the same name are two texts."""
    plain = "".join(c if c.isalnum() and c.isascii() else "-" for c in shown)[:_NAME_CHARACTERS] or "text"
    return f"quickstart-{plain}-{hashlib.sha256(os.fsencode(full)).hexdigest()[:8]}"


def _prepare_settings(source: dict, settings) -> PrepareSettings:
    """A fiftieth of the documents is held out, of few documents a tenth."""
    tree = {
        "source": source,
        "tokenizer": {"vocab_size": settings.model.vocab_size},
        "output": settings.data.shards,
        "heldout_fraction": 0.02,
    }
    prepared = configuration.validate(PrepareSettings, tree, "quickstart")
    is_small = source["kind"] == "text" and local_size(prepared.source)[0] < MANY_DOCUMENTS
    return prepared.model_copy(update={"heldout_fraction": 0.1}) if is_small else prepared


def _ngram_losses(settings, shards_folder: Path, heldout: ShardSet) -> dict[int, float]:
    """Nats per token of n-gram models counted on the windows that the run consumed, on what the model was evaluated
    on."""
    from tnl.data.loader import TrainLoader
    from tnl.evaluation.ngram import evaluate_ngrams

    train = settings.train
    loader = TrainLoader(
        ShardSet.open(shards_folder, "train"),
        seq_len=train.sequence_length,
        global_batch=train.global_batch_size,
        micro_batch=train.micro_batch_size,
        seed=settings.seed,
    )
    tokens = heldout.tokens(0, heldout.num_tokens)
    starts = heldout.document_starts(0, heldout.num_tokens)
    return evaluate_ngrams(lambda: loader.windows_consumed(0, train.steps), tokens, starts, heldout.vocab_size)


def _prompts(source: dict, shards_folder: Path, heldout: ShardSet) -> tuple[str, ...]:
    """Three beginnings: of code, or the first words of three held-out documents."""
    if source["kind"] == "stdlib":
        return CODE_PROMPTS
    tokenizer = Tokenizer.load(shards_folder / "tokenizer.model")
    starts = heldout.document_starts(0, heldout.num_tokens)[:3]
    texts = [tokenizer.decode(heldout.tokens(s, min(s + 64, heldout.num_tokens)).tolist()) for s in starts]
    return tuple(" ".join(text.split()[:PROMPT_WORDS]) for text in texts)


def _generate(model: str, prompts: tuple[str, ...]) -> list[str]:
    from transformers import LlamaForCausalLM

    from tnl.generation.generate import generate_text
    from tnl.generation.load import load_model

    network, tokenizer = load_model(model, llama=LlamaForCausalLM)
    samples = []
    for prompt in prompts:
        text = generate_text(network, tokenizer, prompt, max_new_tokens=64, temperature=0.7)
        samples.append(f"--- prompt: {prompt!r}\n{prompt}{text}")
        print(samples[-1], flush=True)
    return samples


def _summary(settings, result, ngrams: dict[int, float], rate: float, plots: Path, shards_folder: Path) -> str:
    def line(loss: float) -> str:
        bits = loss / math.log(2)
        return f"{loss:.4f} nats  {bits:.4f} bits/token  {bits * result.num_predicted / result.num_bytes:.4f} bits/byte"

    run = settings.output
    tokens = settings.train.steps * settings.train.global_batch_size * settings.train.sequence_length
    rows = [
        ("held-out loss, TNL", line(result.loss)),
        ("interpolated trigram", line(ngrams[3]) + "  (counted on the same tokens)"),
        ("interpolated bigram", line(ngrams[2])),
        ("trained on", f"{tokens:,} tokens at {rate:,.0f} tokens/s"),
        ("results", str(run)),
        ("loss curve", str(plots / "loss.png")),
        ("next", f'tnl generate {run} --prompt "class "'),
        ("", f"tnl evaluate {run} --data {shards_folder} --window 256"),
        ("", f"tnl export {run} my-model"),
    ]
    figures = {
        "tnl": result.row(),
        "ngrams": {str(order): loss for order, loss in ngrams.items()},
        "tokens_per_s": rate,
    }
    (run / "summary.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return format_rows("TransNormerLLM quickstart", rows)
