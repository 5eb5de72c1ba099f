"""The ``tnl`` command: one short function per subcommand.

Heavy imports happen inside them, so that ``tnl --help`` is quick.
"""

import errno
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from tnl.errors import EXIT_CANNOT_WRITE, EXIT_INTERNAL, EXIT_MACHINE, EXIT_PREEMPTED, UserError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Train, evaluate and run TransNormerLLM, the language model on lightning attention.",
    epilog="Exit codes: 0 done, 2 bad usage or configuration, 65 bad data, 69 this machine failed tnl doctor, "
    "70 internal error, 73 cannot write, 75 stopped with a checkpoint saved, 76 diverged, 77 checkpoint damaged or "
    "incompatible, 78 run folder in use, 130 interrupted.",
)
data_app = typer.Typer(no_args_is_help=True, help="Prepare training data.")
app.add_typer(data_app, name="data")

# What a disk or its owner answers; anything else is a defect of ours.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG)

Config = Annotated[str, typer.Argument(help="YAML file, or the name of a shipped one, such as pretrain/quickstart.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides, such as train.steps=100.", show_default=False)
]
Model = Annotated[str, typer.Argument(help="Run folder, model folder, or hub name.", metavar="MODEL_OR_RUN")]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import tnl

        print(f"tnl {tnl.__version__}")
        raise typer.Exit()


@data_app.command("prepare")
def data_prepare(
    config: Config,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Replace shards that were prepared with other settings.")] = False,
) -> None:
    """Tokenize text into shards.

    Examples:

        tnl data prepare data/stdlib

        tnl data prepare my.yaml source.path=~/texts output=data/mine
    """
    from tnl import config as configuration
    from tnl.data.prepare import prepare
    from tnl.data.settings import PrepareSettings

    prepare(configuration.load(PrepareSettings, config, overrides), report=print, fresh=fresh)


@data_app.command("verify")
def data_verify(folder: Annotated[Path, typer.Argument(help="Folder of shards.")]) -> None:
    """Check that every byte of prepared shards is as it was written.

    Example:

        tnl data verify data/quickstart
    """
    from tnl.data.shards import verify

    print(f"{folder}: {verify(folder.expanduser()):,} bytes verified")


@app.command()
def pretrain(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(help="auto: the newest valid checkpoint of the run folder; or a step.")
    ] = "auto",
    fresh: Annotated[bool, typer.Option(help="Begin anew; an existing run folder is moved aside.")] = False,
) -> None:
    """Pretrain from one YAML; the same command goes on where it stopped.

    Examples:

        tnl pretrain pretrain/quickstart

        tnl pretrain pretrain/quickstart output=runs/second optimizer.lr=1e-3

        torchrun --standalone --nproc-per-node 2 -m tnl pretrain my.yaml train.zero_stage=2
    """
    from tnl import config as configuration
    from tnl.training.settings import PretrainSettings

    settings = configuration.load(PretrainSettings, config, overrides)
    from tnl.training.pretrain import pretrain as run

    if run(settings, resume=resume, fresh=fresh) == "preempted":
        raise typer.Exit(EXIT_PREEMPTED)


@app.command()
def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(help="Folder of shards.")],
    split: Annotated[str, typer.Option(help="heldout or train.")] = "heldout",
    max_tokens: Annotated[int | None, typer.Option(help="Read the first so many tokens only.", min=2)] = None,
    window: Annotated[
        int | None, typer.Option(help="Restart the context every so many tokens; default: whole documents.", min=2)
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Held-out loss in nats, bits per token and bits per byte.

    Examples:

        tnl evaluate runs/quickstart --data data/quickstart

        tnl evaluate my-model --data data/quickstart --max-tokens 100000 --json figures.json
    """
    from tnl.evaluation.command import evaluate_shards
    from tnl.training.export import resolve_model

    evaluate_shards(resolve_model(model), data, split, max_tokens, window, json_file)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Length of the continuation.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token at each step.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among so many tokens; 0 for all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Sample among tokens that hold this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Continue a prompt, printing as it goes.

    Examples:

        tnl generate runs/quickstart --prompt "def main("

        tnl generate runs/quickstart --prompt "import os" --temperature 0 --max-new-tokens 50
    """
    from tnl.generation.generate import check_request, generate_text
    from tnl.generation.load import load_model
    from tnl.training.export import resolve_model

    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    check_request(prompt, **options)
    network, tokenizer = load_model(resolve_model(model))
    print(prompt, end="", flush=True)
    generate_text(
        network,
        tokenizer,
        prompt,
        **options,
        seed=seed,
        on_text=lambda text: print(text, end="", flush=True),
    )
    print()


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    step: Annotated[int | None, typer.Option(help="Which checkpoint; default the newest.")] = None,
) -> None:
    """Write a transformers folder: safetensors, config, tokenizer.

    Examples:

        tnl export runs/quickstart my-model

        tnl export runs/quickstart my-model --step 500
    """
    from tnl.training.export import export_run

    print(f"wrote {export_run(run, folder, step)}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Plots and a table of a run.

    Example:

        tnl report runs/quickstart
    """
    from tnl.tools.report import report as make_report
    from tnl.tools.tables import format_rows

    made = make_report(run)
    print(format_rows(str(run), made.rows))
    for note in made.notes:
        print(f"note: {note}")
    print(f"plots: {made.folder}")


@app.command()
def quickstart(
    text: Annotated[Path | None, typer.Option(help="Train on the text files of this folder.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Train on this dataset of the Hugging Face hub.")] = None,
    folder: Annotated[Path, typer.Option(help="Where data and runs are written.")] = Path("."),
    config: Annotated[str, typer.Option(help="Training configuration.")] = "pretrain/quickstart",
    fresh: Annotated[bool, typer.Option(help="Prepare the text and train anew; an older run is moved aside.")] = False,
    on_bad: Annotated[
        str | None, typer.Option(help="skip: leave out texts that are malformed; default: end with an error.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """From raw text to a trained, evaluated, talking model: tokenizer, shards, training, evaluation, three prompts.

    Without options the text is the source code of Python's standard library.

    Examples:

        tnl quickstart

        tnl quickstart --text ~/books --folder /tmp/books --on-bad skip
    """
    from tnl.tools.quickstart import quickstart as run

    run(
        text=text,
        dataset=dataset,
        folder=folder,
        config=config,
        overrides=overrides or [],
        fresh=fresh,
        on_bad=on_bad,
    )


@app.command()
def doctor(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1; default: the first GPU, or the CPU where there is none.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")] = None,
) -> None:
    """Check this machine: GPU, driver, versions, and every kernel against its definition.

    Ends with exit code 69 when a check fails. The first run on a GPU compiles the kernels, which takes minutes.

    Examples:

        tnl doctor

        tnl doctor --device cuda:1 --json doctor.json
    """
    from tnl.tools.doctor import doctor as run

    if not run(device, json_file, report=lambda text: print(text, flush=True)):
        raise typer.Exit(EXIT_MACHINE)


def main() -> None:
    """Run a command; end with one message and a documented exit code when something is wrong.

    Usage errors (2) and the interrupt key (130) are typer's.
    """
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in DISK_ERRORS or error.filename is None:
            _end_internal()
        print(f"error: {error.filename}: {error.strerror}; make room or make it accessible", file=sys.stderr)
        sys.exit(EXIT_CANNOT_WRITE)
    except Exception:
        _end_internal()


def _end_internal() -> None:
    """End with the traceback of a defect of ours."""
    traceback.print_exc()
    print("internal error: please report the lines above", file=sys.stderr)
    sys.exit(EXIT_INTERNAL)
