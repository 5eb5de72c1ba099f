"""The ``tnl`` command: one short function per subcommand.

Heavy imports happen inside them, so that ``tnl --help`` is quick.
"""

import atexit
import logging
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer

from tnl.errors import EXIT_CANNOT_WRITE, EXIT_MACHINE, EXIT_PREEMPTED, UserError, exit_code
from tnl.tools.bench_commands import bench_app
from tnl.tools.data_commands import Config, Overrides, data_app
from tnl.tools.evaluate_commands import Model, evaluate
from tnl.tools.probe_commands import probe_app

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
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(probe_app, name="probe")

Temperature = Annotated[float | None, typer.Option(help="0 takes the most likely token at each step; default 0.8.")]
TopK = Annotated[int | None, typer.Option(help="Sample among so many tokens; 0 for all; default 50.")]
TopP = Annotated[float | None, typer.Option(help="Sample among tokens that hold this probability together.")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]
# torchrun takes --start for an option of its own.
Start = Annotated[Path | None, typer.Option("--start-file", help="Stands for the start of a launcher.", hidden=True)]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import tnl

        print(f"tnl {tnl.__version__}")
        raise typer.Exit()


@app.command()
def pretrain(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(help="auto: the newest valid checkpoint of the run folder; or a step.")
    ] = "auto",
    fresh: Annotated[bool, typer.Option(help="Begin anew; an existing run folder is moved aside.")] = False,
    start: Start = None,
) -> None:
    """Pretrain from one YAML; the same command goes on where it stopped.

    Examples:

        tnl pretrain pretrain/quickstart

        tnl pretrain pretrain/quickstart output=runs/second optimizer.lr=1e-3

        torchrun --standalone --nproc-per-node 2 -m tnl pretrain my.yaml train.zero_stage=2
    """
    from tnl.training.run_configuration import load_settings
    from tnl.training.settings import PretrainSettings
    from tnl.training.start import noted_end

    with noted_end(start):
        settings = load_settings(PretrainSettings, config, overrides)
        from tnl.training.pretrain import pretrain as run

        outcome = run(settings, resume=resume, fresh=fresh, start=start)
    if outcome == "preempted":
        raise typer.Exit(EXIT_PREEMPTED)


@app.command()
def finetune(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(help="auto: the newest valid checkpoint of the run folder; or a step.")
    ] = "auto",
    fresh: Annotated[bool, typer.Option(help="Begin anew; an existing run folder is moved aside.")] = False,
    start: Start = None,
) -> None:
    """Tune a checkpoint on instructions, all of it or by LoRA; the same command goes on where it stopped.

    Examples:

        tnl finetune finetune/quickstart

        tnl finetune finetune/alpaca-1b-lora init_from=runs/mine method.rank=32

        bash scripts/launch_node.sh finetune finetune/alpaca-7b-lora-zero3
    """
    from tnl.training.finetune_settings import FinetuneSettings
    from tnl.training.run_configuration import load_settings
    from tnl.training.start import noted_end

    with noted_end(start):
        settings = load_settings(FinetuneSettings, config, overrides)
        from tnl.training.finetune import finetune as run

        outcome = run(settings, resume=resume, fresh=fresh, start=start)
    if outcome == "preempted":
        raise typer.Exit(EXIT_PREEMPTED)


app.command()(evaluate)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; printed before it is.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to continue, of any length.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Length of the continuation; 0 with --save-state: only read the prompt.")
    ] = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    num_beams: Annotated[int, typer.Option(help="Search with so many beams instead of sampling.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    seed: Seed = 0,
    save_state: Annotated[Path | None, typer.Option(help="Write the state after the prompt to this file.")] = None,
    load_state: Annotated[
        Path | None,
        typer.Option(help="Continue from this state: the prompt, tokenized by itself, follows the text it has read."),
    ] = None,
) -> None:
    """Continue a prompt, printing as it goes.

    The model's state is as large after a book as after a word. Saved, it continues the same prompt again and again,
    and nothing is read twice.

    Examples:

        tnl generate runs/quickstart --prompt "def main("

        tnl generate runs/quickstart --prompt "import os" --temperature 0 --max-new-tokens 50

        tnl generate my-model --prompt-file book.txt --save-state book.safetensors --max-new-tokens 0

        tnl generate my-model --load-state book.safetensors --prompt "In short," --stop "The end"
    """
    from tnl.generation.command import check_folder_of, read_prompt
    from tnl.generation.command import generate as run
    from tnl.generation.options import GenerationOptions
    from tnl.training.export import resolve_model

    options = None
    if max_new_tokens or save_state is None:
        options = GenerationOptions(
            max_new_tokens, temperature, top_k, top_p, num_beams=num_beams, seed=seed, stop=tuple(stop or ())
        )
    text = read_prompt(prompt, prompt_file, continues=load_state is not None)
    check_folder_of(save_state)
    run(resolve_model(model), text, options, echo=prompt is not None, load_from=load_state, save_to=save_state)


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="Instruction that stands before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer.")] = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
) -> None:
    """Talk to a model, one line a turn. It keeps its state between turns and reads only what is new.

    The tokenizer's chat template is used if it has one, otherwise lines "Human:" and "Assistant:" before each turn. The
    commands /reset, /save FILE, /load FILE, /help and /exit are no turns. The interrupt key stops an answer.

    Examples:

        tnl chat my-model

        tnl chat my-model --system "Answer in one sentence." --temperature 0
    """
    from tnl.generation.chat import chat as run
    from tnl.generation.options import GenerationOptions
    from tnl.training.export import resolve_model

    options = GenerationOptions(max_new_tokens, temperature, top_k, top_p, seed=seed)
    run(resolve_model(model), options, system)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    step: Annotated[
        str | None, typer.Option(help="Which checkpoint: a step, or best, the lowest held-out loss; default newest.")
    ] = None,
    merge: Annotated[bool, typer.Option(help="Of a LoRA run: the adapter merged into the weights.")] = False,
) -> None:
    """Write a transformers folder: safetensors, config, tokenizer; of a LoRA run the adapter, as peft saves it.

    Examples:

        tnl export runs/quickstart my-model

        tnl export runs/quickstart my-model --step 500

        tnl export runs/tuned my-model --merge --step best
    """
    from tnl.training.export import BEST, export_run

    if step is not None and step != BEST and not step.isdigit():
        raise UserError(f"--step {step}: give the step of a checkpoint, or best")
    chosen = int(step) if step is not None and step.isdigit() else step
    print(f"wrote {export_run(run, folder, chosen, merge=merge)}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Model folder, or file of weights.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[Literal["safetensors", "pickle"], typer.Option(help="What to write.")] = "safetensors",
    max_shard_size: Annotated[str, typer.Option(help="Larger models are split into files of at most this.")] = "5GB",
    config: Annotated[Path | None, typer.Option(help="The model's config.json, if it is elsewhere.")] = None,
) -> None:
    """Write a checkpoint as safetensors, or back as pickles, and compare every tensor with the original.

    A pickle is read without running code that it may hold. Names as metaseq gives them (decoder.*) are read, too.

    Examples:

        tnl convert TransNormerLLM-7B TransNormerLLM-7B-safe

        tnl convert checkpoint_last.pt my-model --config TransNormerLLM-7B/config.json

        tnl convert my-model for-older-programs --to pickle --max-shard-size 10GB
    """
    from tnl.tools.convert import convert as run

    written = run(source, folder, to=to, max_shard_size=max_shard_size, config_file=config)
    print(f"wrote {written}: every tensor verified")
    if not any(written.glob("tokenizer.*")):
        print(f"{source}: no tokenizer.model or tokenizer.json there, so none was written")


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
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Two to four run folders, or two folders that tnl evaluate --suite wrote.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for comparison.png and comparison.json.")] = Path("comparison"),
) -> None:
    """Held-out loss of several runs, or benchmark scores of two models by paired differences with 95 % intervals.

    Examples:

        tnl compare runs/tnl runs/llama --output comparison

        tnl compare evaluation/first-paper evaluation/second-paper
    """
    from tnl.tools.comparison import show_comparison

    show_comparison(runs, output)


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
def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs.", min=1)] = 1,
    mfu: Annotated[float, typer.Option(help="Model FLOPs utilisation to count with.", min=0.001, max=1)] = 0.5,
    tokens: Annotated[str | None, typer.Option(help="Token budget, such as 300B; default that of the config.")] = None,
    gpu_memory: Annotated[str, typer.Option(help="GiB of the GPUs to check.")] = "24,40,80,141",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """What a run will take, without a GPU: parameters, operations, memory of each GPU by part, time and GPU-hours.

    The peak arithmetic rate is logging.peak_tflops, or that of an H100.

    Examples:

        tnl plan pretrain/tnl-1b --gpus 8

        tnl plan pretrain/tnl-7b train.activation_checkpointing=full --gpus 64 --mfu 0.45 --tokens 1.4T --json plan.json
    """
    from tnl.training.run_configuration import load_settings
    from tnl.training.settings import PretrainSettings

    settings = load_settings(PretrainSettings, config, overrides)
    from tnl.tools.plan import plan as run

    run(settings, gpus=gpus, mfu=mfu, tokens=tokens, gpu_memory=gpu_memory, json_file=json_file)


Run = Annotated[str, typer.Argument(help="Run folder, or the configuration that tnl pretrain was given.")]


@app.command()
def status(
    run: Run,
    overrides: Overrides = None,
    start: Start = None,
) -> None:
    """How a run stands; ends with the exit code of the run, which torchrun and deepspeed lose.

    Examples:

        tnl status runs/quickstart

        tnl status pretrain/quickstart output=runs/second
    """
    from tnl.tools.status import run_folder
    from tnl.tools.status import status as show

    raise typer.Exit(show(run_folder(run, overrides or []), start))


@app.command()
def stop(run: Run, overrides: Overrides = None, start: Start = None) -> None:
    """Ask a run, on whatever machines it is, to save a checkpoint and end; the command that started it goes on later.

    Example:

        tnl stop runs/quickstart
    """
    from tnl.tools.status import run_folder
    from tnl.tools.status import stop as ask

    ask(run_folder(run, overrides or []), start)


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
    # transformers imports torchao where it is installed, and that complains of GPU kernels and of itself to torch.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except SystemExit as end:
        if end.code in (None, 0, EXIT_PREEMPTED):
            atexit.register(_leave_group)
        raise
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if exit_code(error) != EXIT_CANNOT_WRITE:
            _end_internal(error)
        print(f"error: {error.filename}: {error.strerror}; make room or make it accessible", file=sys.stderr)
        sys.exit(EXIT_CANNOT_WRITE)
    except Exception as error:
        _end_internal(error)


def _leave_group() -> None:
    """Close the connections to the other processes of a run, as torch asks for.

    Not after an error: there the others may be in the middle of something that this one would wait for. And only at the
    end of the process: what DeepSpeed keeps of the connections does not outlive them.
    """
    if "torch" not in sys.modules:
        return
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _end_internal(error: Exception) -> None:
    """End with the traceback of a defect of ours."""
    traceback.print_exc()
    print("internal error: please report the lines above", file=sys.stderr)
    sys.exit(exit_code(error))
