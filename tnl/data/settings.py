"""Settings of data preparation (`tnl data prepare`) and of the training data section."""

import os
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from tnl.errors import did_you_mean
from tnl.settings import Settings


def _user_path(path: str) -> str:
    """``path`` with ``~`` expanded, as a shell would have done."""
    if "\0" in path:
        raise ValueError("a path cannot hold a NUL character")
    return os.path.expanduser(path)


UserPath = Annotated[str, AfterValidator(_user_path)]


class RecordSource(Settings):
    """What every source of the user's own data shares.

    ``on_bad: skip`` counts malformed records and goes on, until more than ``max_bad_fraction`` of all records are bad.
    """

    section: ClassVar[str] = "source"  # where the section stands in a configuration, and what else sets on_bad
    skip_hint: ClassVar[str] = ""

    on_bad: Literal["error", "skip"] = "error"
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_document_bytes: Annotated[int, Field(gt=0)] = 2**26


class UserSource(RecordSource):
    """The user's own text. ``max_bytes`` keeps about that much of it in UTF-8, chosen by content hash and not by
    position."""

    skip_hint: ClassVar[str] = " (of tnl quickstart: --on-bad skip)"

    max_bytes: Annotated[int, Field(gt=0)] | None = None


class TextSource(UserSource):
    """A text file, or all files with one of ``suffixes`` below a folder; one document each."""

    kind: Literal["text"]
    path: UserPath
    suffixes: Annotated[list[str], Field(min_length=1, default_factory=lambda: [".txt", ".md"])]


class JsonlSource(UserSource):
    """A JSON Lines file, or all ``*.jsonl`` files below a folder; one document per line."""

    kind: Literal["jsonl"]
    path: UserPath
    text_field: str = "text"


class DatasetSource(UserSource):
    """A dataset of the Hugging Face hub, or a local folder that the `datasets` library reads."""

    kind: Literal["dataset"]
    path: UserPath
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    text_field: str = "text"


class StdlibSource(Settings):
    """The sources of this Python's standard library, a corpus on every machine; files not in UTF-8 are skipped."""

    kind: Literal["stdlib"]
    max_bytes: Annotated[int, Field(gt=0)] | None = None


Source = Annotated[TextSource | JsonlSource | DatasetSource | StdlibSource, Field(discriminator="kind")]


class TokenizerSettings(Settings):
    """``model``, a sentencepiece file, or ``vocab_size`` to train one on ``sample_bytes`` of the train split."""

    model: UserPath | None = None
    vocab_size: Annotated[int, Field(gt=0)] | None = None
    sample_bytes: Annotated[int, Field(gt=0)] = 10_000_000
    character_coverage: Annotated[float, Field(gt=0, le=1)] = 0.9995

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizerSettings":
        if (self.model is None) == (self.vocab_size is None):
            raise ValueError("give either model (a sentencepiece file) or vocab_size (to train one)")
        return self


class PrepareSettings(Settings):
    """One complete preparation: source, tokenizer, output folder.

    ``num_workers`` is the number of tokenizing threads, 0 for one per usable core; it does not change the result.
    """

    source: Source
    tokenizer: TokenizerSettings
    output: UserPath
    shard_tokens: Annotated[int, Field(gt=0)] = 2**26
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    add_bos: bool = True
    add_eos: bool = True
    seed: int = 0
    num_workers: Annotated[int, Field(ge=0)] = 0


class DataSettings(Settings):
    """The ``data`` section of a training run.

    ``packing`` keeps documents apart (state and prediction restart at each); without it a window is one text.
    """

    shards: UserPath
    packing: bool = True
    num_workers: Annotated[int, Field(ge=0)] = 0


# The fields by which a record shows its format, and those that it can have besides.
FORMAT_FIELDS = {
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
}
_FURTHER_FIELDS = {
    "alpaca": ("input",),
    "sharegpt": ("system",),
    "messages": ("system",),
    "prompt_completion": ("system",),
}


class InstructionSource(RecordSource):
    """What every source of the user's own instruction data shares.

    ``columns`` maps a field of the format to the name it has in the data (``instruction: question``). Records with the
    same value of ``id_field`` are bad; null switches that off.
    """

    section: ClassVar[str] = "data.source"

    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion"] = "auto"
    columns: Annotated[dict[str, str], Field(default_factory=dict)]
    id_field: str | None = "id"

    def check_columns(self, name: str) -> None:
        """Raise ValueError where ``columns`` maps what is no field of the format ``name`` (``auto``: of any)."""
        formats = FORMAT_FIELDS if name == "auto" else [name]
        known = dict.fromkeys(field for key in formats for field in (*FORMAT_FIELDS[key], *_FURTHER_FIELDS[key]))
        for field in self.columns:
            if field not in known:
                of = "any format" if name == "auto" else f"the format {name}"
                raise ValueError(f"columns.{field}: no field of {of}, {did_you_mean(field, known)}")

    @model_validator(mode="after")
    def _known_columns(self) -> "InstructionSource":
        self.check_columns(self.format)
        return self


class JsonInstructions(InstructionSource):
    """A file, or all ``*.json`` and ``*.jsonl`` files below a folder: an array of records, or one record a line."""

    kind: Literal["json"]
    path: UserPath


class DatasetInstructions(InstructionSource):
    """A dataset of the Hugging Face hub, or a local folder that the `datasets` library reads."""

    kind: Literal["dataset"]
    path: UserPath
    config: str | None = None
    split: str = "train"
    streaming: bool = False


class StdlibInstructions(Settings):
    """Signatures to write from docstrings, made of this Python's standard library; ``max_examples`` are drawn."""

    kind: Literal["stdlib"]
    max_examples: Annotated[int, Field(gt=0)] | None = None


Instructions = Annotated[JsonInstructions | DatasetInstructions | StdlibInstructions, Field(discriminator="kind")]


class FinetuneDataSettings(Settings):
    """The ``data`` section of a fine-tuning run.

    - ``template``: ``reference`` (Human and Assistant lines), ``verbatim`` (nothing but the texts), a Jinja file, or
      ``auto``: the tokenizer's own if it has one, otherwise ``reference``.
    - ``system``: stands before every conversation.
    - ``too_long``: an example beyond train.sequence_length loses its end, or is left out.
    - ``batching``: ``packed`` sequences are full of whole examples, and state and prediction restart at each;
      ``grouped`` pads examples of like lengths to the longest of a batch, ``padded`` those of random lengths.
    """

    source: Instructions
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    template: UserPath = "auto"
    system: str | None = None
    too_long: Literal["truncate", "drop"] = "truncate"
    batching: Literal["packed", "grouped", "padded"] = "packed"
    num_workers: Annotated[int, Field(ge=0)] = 0
