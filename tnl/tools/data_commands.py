"""The ``tnl data`` commands: one short function each; heavy imports happen inside them, as in `tnl.cli`."""

from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(no_args_is_help=True, help="Prepare training data, and look at it.")

Config = Annotated[str, typer.Argument(help="YAML file, or the name of a shipped one, such as pretrain/quickstart.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides, such as train.steps=100.", show_default=False)
]


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


@data_app.command("inspect")
def data_inspect(
    config: Config,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(help="How many examples to show.", min=0)] = 3,
) -> None:
    """Show what fine-tuning would train on: template, tokens, which of them are learned, how sequences are filled.

    Examples:

        tnl data inspect finetune/quickstart

        tnl data inspect my.yaml --examples 10 data.template=my.jinja
    """
    from tnl.tools.data_inspect import inspect_data
    from tnl.training.finetune_settings import FinetuneSettings
    from tnl.training.run_configuration import load_settings

    inspect_data(load_settings(FinetuneSettings, config, overrides), examples)


@data_app.command("fetch")
def data_fetch(
    tasks: Annotated[
        list[str], typer.Argument(help="Suites (paper, scrolls, perplexity, scaling-laws) and tasks of lm-eval.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write: TASK/SPLIT.parquet.")] = Path("tasks"),
) -> None:
    """Bring the data of benchmarks from the hub, for tnl evaluate --data-dir on any machine.

    Examples:

        tnl data fetch paper --output tasks

        tnl data fetch hellaswag mmlu_anatomy
    """
    from tnl.evaluation.harness_package import check_harness
    from tnl.evaluation.suite_command import expand_suites

    check_harness()
    from tnl.evaluation.task_fetch import fetch

    fetch(expand_suites(tasks), output.expanduser(), report=lambda text: print(text, flush=True))
