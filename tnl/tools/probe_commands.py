"""The ``tnl probe`` commands: one short function each; heavy imports happen inside them, as in `tnl.cli`."""

from pathlib import Path
from typing import Annotated

import typer

from tnl.tools.number_lists import numbers_of

probe_app = typer.Typer(no_args_is_help=True, help="Look at what a model does with long texts.")

Model = Annotated[str, typer.Argument(help="Run folder, model folder, or hub name.", metavar="MODEL_OR_RUN")]
Lengths = Annotated[str, typer.Option(help="Tokens of the prompts, with commas between.")]
Text = Annotated[
    Path | None, typer.Option(help="Text file to read from; default: the source code of Python's standard library.")
]
Output = Annotated[Path, typer.Option(help="Folder for the JSON files and the figures.")]
Depths = Annotated[int, typer.Option(help="Places of the fact, from the beginning to the end.", min=1)]
Samples = Annotated[int, typer.Option(help="Different facts for each place.", min=1)]
Candidates = Annotated[int, typer.Option(help="Numbers among which the true one is ranked.", min=2)]
Seed = Annotated[int, typer.Option(help="Of the numbers.")]
DEFAULT_LENGTHS = "1024,2048,4096,8192,16384,32768"


@probe_app.command("needle")
def needle(
    model: Model,
    lengths: Lengths = DEFAULT_LENGTHS,
    depths: Depths = 11,
    samples: Samples = 5,
    candidates: Candidates = 10,
    text: Text = None,
    seed: Seed = 0,
    output: Output = Path("probe"),
) -> None:
    """Needle in a haystack: a number that stands somewhere in a long text is asked for; heat map by depth and length.

    Examples:

        tnl probe needle runs/mine

        tnl probe needle my-model --lengths 4096,131072 --depths 5 --text book.txt --output probe/book
    """
    sizes = numbers_of("--lengths", lengths, 1)
    from tnl.evaluation.retrieval import NEEDLE
    from tnl.tools.probe import probe_retrieval as run

    run(
        model,
        NEEDLE,
        lengths=sizes,
        depths=depths,
        samples=samples,
        candidates=candidates,
        text=text,
        seed=seed,
        output=output,
    )


@probe_app.command("passkey")
def passkey(
    model: Model,
    lengths: Lengths = DEFAULT_LENGTHS,
    depths: Depths = 5,
    samples: Samples = 10,
    candidates: Candidates = 10,
    seed: Seed = 0,
    output: Output = Path("probe"),
) -> None:
    """A pass key hidden among sentences that repeat; heat map by depth and length.

    Example:

        tnl probe passkey runs/mine --lengths 1024,4096
    """
    sizes = numbers_of("--lengths", lengths, 1)
    from tnl.evaluation.retrieval import PASSKEY
    from tnl.tools.probe import probe_retrieval as run

    run(
        model,
        PASSKEY,
        lengths=sizes,
        depths=depths,
        samples=samples,
        candidates=candidates,
        text=None,
        seed=seed,
        output=output,
    )


@probe_app.command("positions")
def positions(
    model: Model,
    length: Annotated[int, typer.Option(help="Tokens of each text.", min=2)] = 32768,
    texts: Annotated[int, typer.Option(help="Texts, one after the other from the file.", min=1)] = 8,
    buckets: Annotated[int, typer.Option(help="Ranges of positions.", min=1)] = 32,
    trained: Annotated[
        int | None, typer.Option(help="Mark the length of training; default: that of a run folder.", min=1)
    ] = None,
    text: Text = None,
    output: Output = Path("probe"),
) -> None:
    """Loss and perplexity by position, also beyond the length of training, in constant memory.

    Examples:

        tnl probe positions runs/mine

        tnl probe positions my-model --length 1048576 --texts 1 --trained 8192 --text book.txt
    """
    from tnl.tools.probe import probe_positions as run

    run(model, length=length, texts=texts, buckets=buckets, trained=trained, text=text, output=output)


@probe_app.command("lengths")
def lengths(
    model: Model,
    lengths: Annotated[str, typer.Option(help="Tokens of the texts, with commas between.")] = (
        "1024,4096,16384,65536,262144,1048576"
    ),
    output: Output = Path("probe"),
) -> None:
    """Time and memory of reading one text, by its length.

    Example:

        tnl probe lengths my-model --lengths 16384,1048576
    """
    sizes = numbers_of("--lengths", lengths, 1)
    from tnl.tools.probe import probe_lengths as run

    run(model, lengths=sizes, output=output)


@probe_app.command("ruler")
def ruler(
    model: Model,
    tasks: Annotated[
        str | None, typer.Option(help="Of RULER, such as ruler_vt,niah_single_1; default: all thirteen.")
    ] = None,
    lengths: Lengths = "4096",
    samples: Annotated[int, typer.Option(help="Prompts of each task and length.", min=1, max=500)] = 100,
    output: Output = Path("probe"),
    allow_empty: Annotated[
        bool,
        typer.Option("--allow-empty", help="Count empty texts as wrong answers; else a task with one is not scored."),
    ] = False,
) -> None:
    """RULER by lm-eval. A task whose data is not here is named with what it needs; the others run.

    Exit code 65: answers of the model are empty.

    Example:

        tnl probe ruler my-model --tasks ruler_vt,ruler_fwe --lengths 4096,8192
    """
    sizes = numbers_of("--lengths", lengths, 1)
    from tnl.evaluation.harness_package import check_harness

    check_harness()
    from tnl.evaluation.ruler import NEEDS
    from tnl.tools.probe import probe_ruler as run

    names = [name.strip() for name in tasks.split(",")] if tasks else list(NEEDS)
    run(model, tasks=names, lengths=sizes, samples=samples, output=output, allow_empty=allow_empty)
