"""The ``tnl bench`` commands: one short function each; heavy imports happen inside them, as in `tnl.cli`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tnl.tools.number_lists import numbers_of

bench_app = typer.Typer(no_args_is_help=True, help="Measure speed, beside a LLaMA of equal size.")

BenchModel = Annotated[str, typer.Argument(help="Name in configs/model, or a YAML file; the weights are random.")]
BenchDevice = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; default: the GPU if there is one.")]
BenchOverrides = Annotated[
    list[str] | None,
    typer.Argument(help="Dotted keys of a run's configuration, such as train.compile=true.", show_default=False),
]
BenchJson = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]


@bench_app.command("generate")
def bench_generate(
    model: BenchModel = "tnl-7b",
    batch: Annotated[str, typer.Option(help="Numbers of sequences; the sweep ends where memory does.")] = (
        "1,16,64,256,512,768"
    ),
    prompt_tokens: Annotated[int, typer.Option(help="Length of each prompt.", min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=8)] = 1024,
    context: Annotated[str, typer.Option(help="Prompt lengths at which one sequence is stepped.")] = "1024,131072",
    positions: Annotated[
        int, typer.Option(help="Tokens generated in a row to watch the memory; 0 leaves it out.", min=0)
    ] = 0,
    baseline: Annotated[bool, typer.Option(help="Also measure a LLaMA of equal size.")] = True,
    device: BenchDevice = None,
    json_file: BenchJson = None,
) -> None:
    """Decoding: tokens/s over batch sizes, time per step against the memory's floor, and an equal LLaMA.

    Examples:

        tnl bench generate tnl-7b --json generate.json

        tnl bench generate tnl-tiny --batch 1,4 --prompt-tokens 16 --new-tokens 16 --context 64
    """
    batches, contexts = numbers_of("--batch", batch, 1), numbers_of("--context", context, 1)
    from tnl.tools.bench_generate import bench_generate as run

    run(
        model,
        batches=batches,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        contexts=contexts,
        positions=positions,
        baseline=baseline,
        device=device,
        json_file=json_file,
        report=lambda text: print(text, flush=True),
    )


@bench_app.command("prefill")
def bench_prefill(
    model: BenchModel = "tnl-1b",
    tokens: Annotated[str, typer.Option(help="Prompt lengths.")] = "32768,131072",
    device: BenchDevice = None,
    json_file: BenchJson = None,
) -> None:
    """Time to the first token of long prompts, and that of an equal LLaMA on each backend of PyTorch's attention.

    Examples:

        tnl bench prefill tnl-1b --json prefill.json

        tnl bench prefill tnl-tiny --tokens 1024,4096
    """
    lengths = numbers_of("--tokens", tokens, 1)
    from tnl.tools.bench_prefill import bench_prefill as run

    run(model, lengths=lengths, device=device, json_file=json_file, report=lambda text: print(text, flush=True))


@bench_app.command("train")
def bench_train(
    model: BenchModel = "tnl-1b",
    overrides: BenchOverrides = None,
    lengths: Annotated[str, typer.Option(help="Sequence lengths; those that do not fit are recorded as such.")] = (
        "1024,2048,4096,8192,16384,32768,65536,131072"
    ),
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of an optimizer step, over all GPUs.", min=2)] = 131072,
    micro_tokens: Annotated[int, typer.Option(help="Tokens of a forward pass of one GPU.", min=2)] = 16384,
    kinds: Annotated[
        str,
        typer.Option(help="Of tnl, tnl-fla (fla's kernel in plain PyTorch), llama (FlashAttention) and llama-cudnn."),
    ] = "tnl,llama",
    steps: Annotated[int, typer.Option(help="Steps that are timed; the median counts.", min=1)] = 5,
    warmup: Annotated[int, typer.Option(help="Steps before them.", min=1)] = 2,
    engine: Annotated[
        Literal["deepspeed", "torch"] | None,
        typer.Option(help="deepspeed, the training loop's own, or plain PyTorch; default: the first if installed."),
    ] = None,
    json_file: BenchJson = None,
) -> None:
    """Training: tokens per GPU per second by sequence length, against the model's matrix products alone and a LLaMA.

    Overrides are keys of a run, such as train.activation_checkpointing=full. Under torchrun it is data parallel, or
    sequence parallel by train.sequence_parallel.

    Examples:

        tnl bench train tnl-1b --json train.json

        tnl bench train tnl-1b --kinds tnl,tnl-fla,llama --lengths 16384

        tnl bench train tnl-1b train.activation_checkpointing=full --lengths 16384,131072 --kinds tnl

        torchrun --standalone --nproc-per-node 4 -m tnl bench train tnl-1b --lengths 16384 --tokens-per-step 524288
    """
    sizes = numbers_of("--lengths", lengths, 2)
    from tnl.tools.bench_train import bench_train as run

    run(
        model,
        lengths=sizes,
        tokens_per_step=tokens_per_step,
        micro_tokens=micro_tokens,
        kinds=[kind.strip() for kind in kinds.split(",")],
        steps=steps,
        warmup=warmup,
        engine=engine,
        overrides=overrides or [],
        json_file=json_file,
        report=lambda text: print(text, flush=True),
    )


@bench_app.command("finetune")
def bench_finetune(
    model: BenchModel = "tnl-1b",
    overrides: BenchOverrides = None,
    lora_model: Annotated[str, typer.Option(help="The model of the LoRA part.")] = "tnl-7b",
    only: Annotated[Literal["packing", "lora"] | None, typer.Option(help="Leave the other part out.")] = None,
    pass_tokens: Annotated[
        int, typer.Option(help="Tokens of a forward pass of the packing part, padding included.", min=2)
    ] = 16384,
    passes: Annotated[int, typer.Option(help="Forward passes of an optimizer step.", min=1)] = 8,
    lora_tokens: Annotated[int, typer.Option(help="Tokens of a forward pass of the LoRA part.", min=2)] = 2048,
    bits: Annotated[str, typer.Option(help="Of LoRA's frozen weights; 4 needs torchao.")] = "4,16",
    examples: Annotated[int, typer.Option(help="How many examples are made.", min=1)] = 52002,
    steps: Annotated[int, typer.Option(help="Steps that are timed; the median counts.", min=1)] = 3,
    json_file: BenchJson = None,
) -> None:
    """Fine-tuning: real tokens/s of packed against padded examples of Alpaca's lengths, and LoRA's peak memory.

    The first part trains all weights of MODEL, the second LoRA on those of --lora-model with every block computed
    again. Overrides are keys of a run, for both parts.

    Examples:

        tnl bench finetune tnl-1b --lora-model tnl-7b --json finetune.json

        tnl bench finetune --only lora --lora-model tnl-1b --bits 4

        tnl bench finetune tnl-1b train.activation_checkpointing=selective --only packing
    """
    base_bits = numbers_of("--bits", bits, 4)
    from tnl.tools.bench_finetune import PARTS
    from tnl.tools.bench_finetune import bench_finetune as run

    run(
        model,
        lora_name=lora_model,
        parts=[only] if only else list(PARTS),
        pass_tokens=pass_tokens,
        passes=passes,
        lora_tokens=lora_tokens,
        base_bits=base_bits,
        num_examples=examples,
        steps=steps,
        overrides=overrides or [],
        json_file=json_file,
        report=lambda text: print(text, flush=True),
    )


@bench_app.command("evaluate")
def bench_evaluate(
    model: BenchModel = "tnl-1b",
    subjects: Annotated[int, typer.Option(help="Few-shot prefixes of MMLU's shape.", min=1)] = 57,
    questions: Annotated[int, typer.Option(help="Questions behind each of them.", min=1)] = 250,
    contexts: Annotated[int, typer.Option(help="Contexts of HellaSwag's shape.", min=1)] = 4000,
    document: Annotated[int, typer.Option(help="Tokens of the long text.", min=2)] = 2**20,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a forward pass.", min=1)] = 2**14,
    only: Annotated[
        str | None, typer.Option(help="Some of mmlu, long-choices, hellaswag, document and accuracy; default: all.")
    ] = None,
    device: BenchDevice = None,
    json_file: BenchJson = None,
) -> None:
    """Evaluation: our adapter beside lm-eval's own on requests of MMLU's and HellaSwag's shapes, and one long text.

    Examples:

        tnl bench evaluate tnl-1b --json evaluate.json

        tnl bench evaluate tnl-tiny --subjects 2 --questions 4 --contexts 4 --document 4096
    """
    from tnl.tools.bench_evaluate import EvaluateWork, chosen_parts
    from tnl.tools.bench_evaluate import bench_evaluate as run

    run(
        model,
        work=EvaluateWork(subjects, questions, contexts, document, batch_tokens),
        parts=chosen_parts(only),
        device=device,
        json_file=json_file,
        report=lambda text: print(text, flush=True),
    )
