"""``tnl evaluate``: held-out loss, or benchmarks; heavy imports happen inside, as in `tnl.cli`."""

from pathlib import Path
from typing import Annotated

import typer

from tnl.errors import ConfigError

Model = Annotated[str, typer.Argument(help="Run folder, model folder, or hub name.", metavar="MODEL_OR_RUN")]


def evaluate(
    model: Model,
    data: Annotated[Path | None, typer.Option(help="Folder of shards, for held-out loss.")] = None,
    split: Annotated[str, typer.Option(help="With --data: heldout or train.")] = "heldout",
    max_tokens: Annotated[
        int | None, typer.Option(help="With --data: read the first so many tokens only.", min=2)
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="With --data: restart the context every so many tokens; default: whole documents.", min=2),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="With --data: also write the figures to this file.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="paper, scrolls, perplexity, scaling-laws, quick, or a YAML file: benchmarks of lm-eval."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, comma-separated; with --suite, those of its tasks only.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with the tasks' data: TASK/SPLIT.jsonl or .parquet; default: the datasets cache."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Of documents of each task.", min=1)] = None,
    few_shot: Annotated[int | None, typer.Option(help="Examples before each question.", min=0)] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a forward pass.", min=1)] = 16384,
    max_length: Annotated[
        int | None, typer.Option(help="Cut contexts to so many tokens; default: none is cut.", min=1)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report; default evaluation/MODEL-SUITE. The same resumes.")
    ] = None,
    bench: Annotated[
        list[Path] | None, typer.Option(help="JSON of tnl bench train or generate to report, too; may be given again.")
    ] = None,
    allow_empty: Annotated[
        bool,
        typer.Option("--allow-empty", help="Count empty texts as answers; else a task with one is not scored."),
    ] = False,
    confirm_unsafe: Annotated[
        bool,
        typer.Option(
            "--confirm-unsafe", help="Run programs that the model writes, and metrics that are programs of the hub."
        ),
    ] = False,
) -> None:
    """Held-out loss on prepared text, or benchmarks beside the published scores of TNL and other models.

    Benchmarks run without a network, on data that tnl data fetch brought; --suite quick needs none. A killed
    evaluation goes on where it stood. Exit code 65: some tasks lack data, or texts of the model are empty; the
    others are in the report.

    Examples:

        tnl evaluate runs/quickstart --data data/quickstart

        tnl evaluate my-model --data data/quickstart --max-tokens 100000 --json figures.json

        tnl evaluate runs/quickstart --suite quick

        tnl evaluate my-model --suite paper --data-dir tasks --output evaluation/mine

        tnl evaluate my-model --tasks hellaswag,mmlu_anatomy --few-shot 5 --limit 100

        torchrun --standalone --nproc-per-node 8 -m tnl evaluate my-model --suite paper --data-dir tasks
    """
    if (data is None) == (suite is None and tasks is None):
        raise ConfigError("give --data for held-out loss, or --suite or --tasks for benchmarks")
    for_data = {"--max-tokens": max_tokens, "--window": window, "--json": json_file}
    for_suites = {"--data-dir": data_dir, "--limit": limit, "--few-shot": few_shot, "--max-length": max_length}
    for_suites |= {"--output": output, "--bench": bench, "--confirm-unsafe": confirm_unsafe or None}
    for_suites |= {"--allow-empty": allow_empty or None}
    wrong = [name for name, value in (for_data if data is None else for_suites).items() if value is not None]
    if wrong:
        kind = "--suite and --tasks" if data is None else "--data"
        raise ConfigError(f"{', '.join(wrong)}: of no use with {kind}; leave out")
    from tnl.training.export import resolve_model

    if data is not None:
        from tnl.evaluation.command import evaluate_shards

        evaluate_shards(resolve_model(model), data, split, max_tokens, window, json_file)
        return
    from tnl.evaluation.suite_command import SuiteOptions, evaluate_suite

    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    if tasks is not None and not names:
        raise ConfigError("--tasks: names none; give for example hellaswag,piqa")
    options = SuiteOptions(
        suite=suite,
        tasks=names,
        output=(
            output or Path("evaluation") / f"{Path(model).absolute().name}-{Path(suite or 'tasks').stem}"
        ).expanduser(),
        data_dir=data_dir,
        limit=limit,
        confirm_unsafe=confirm_unsafe,
        batch_tokens=batch_tokens,
        max_length=max_length,
        num_fewshot=few_shot,
        allow_empty=allow_empty,
        bench=tuple(bench or ()),
    )
    evaluate_suite(model, options, resolve=resolve_model, report=lambda text: print(text, flush=True))
