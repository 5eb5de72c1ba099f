"""`tnl plan`: its memory against what autograd keeps and what DeepSpeed holds, and what it prints."""

import contextlib
import gc
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tnl_kernels import dispatch

from tests.tiny_model import random_ids, tiny_config, tiny_model
from tests.tiny_run import tiny_run
from tnl import config as configuration
from tnl.errors import ConfigError
from tnl.model.activation_memory import block_memory, head_memory
from tnl.model.baseline import llama_config
from tnl.model.baseline_memory import llama_block_memory, llama_head_memory
from tnl.model.baseline_training import LlamaBaseline
from tnl.model.kinds import model_class, model_config, num_parameters
from tnl.model.settings import ModelSettings
from tnl.tools.bench_engines import Place
from tnl.tools.bench_train import settings_of
from tnl.tools.plan import figures, read_sizes, read_tokens
from tnl.training.memory import memory_plan
from tnl.training.settings import PretrainSettings

ROOT = Path(__file__).parent.parent
FP32, BF16 = torch.float32, torch.bfloat16
GIB = 2**30


def kept_bytes(model, ids) -> int:
    """Bytes of all tensors but the weights that autograd keeps for the backward pass, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, labels=ids, use_cache=False)
    return sum(storage.nbytes() for storage in found.values())


def planned_kept(config, tokens: int, dtype: torch.dtype) -> int:
    blocks = [block_memory(config, i, tokens, dtype).kept for i in range(config.decoder_layers)]
    head = head_memory(config, tokens, dtype)
    return sum(blocks) + head.stream // 2 + head.gradients  # the final norm's output is not kept


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"linear_use_lrpe_list": []},
        {"linear_act_fun": "none"},
        {"mixer_norm_type": "layernorm"},
        {"gate_dim": 8},
        {"gate_dim": 8, "linear_act_fun": "none", "linear_use_lrpe_list": [1, 1]},
    ],
    ids=str,
)
def test_activations_are_those_that_autograd_keeps(values, dtype):
    model = tiny_model(decoder_embed_dim=64, hidden_dim=128, glu_dim=192, decoder_layers=3, **values).train().to(dtype)
    ids = random_ids(2, 128)
    assert planned_kept(model.config, ids.numel(), dtype) == pytest.approx(kept_bytes(model, ids), rel=0.01)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_activations_of_a_llama_are_those_that_autograd_keeps(dtype):
    sizes = dict(decoder_embed_dim=256, decoder_attention_heads=2, glu_dim=256, decoder_layers=3)
    model = LlamaBaseline(llama_config(tiny_config(**sizes))).train().to(dtype)
    ids = random_ids(4, 64)
    blocks = 3 * llama_block_memory(model.config, ids.numel(), dtype).kept
    head = llama_head_memory(model.config, ids.numel(), dtype)
    output = ids.numel() * 256 * dtype.itemsize  # of the final norm, which is not kept
    planned = blocks + head.stream - output + head.gradients
    # The phases of the rotary positions, once for all blocks, are half a percent of these small ones.
    assert planned == pytest.approx(kept_bytes(model, ids), rel=0.01)


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs Triton and its interpreter")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
@pytest.mark.parametrize("values", [{}, {"gate_dim": 8}], ids=str)
def test_activations_are_those_that_the_gpu_operators_keep(values, monkeypatch):
    monkeypatch.setitem(dispatch.FORM_OF_DEVICE, "cpu", "triton")
    model = tiny_model(decoder_embed_dim=64, hidden_dim=64, glu_dim=96, **values).train()
    ids = random_ids(1, 64)
    assert planned_kept(model.config, ids.numel(), FP32) == pytest.approx(kept_bytes(model, ids), rel=0.01)


def measured_peaks() -> list[tuple]:
    """(model, kind, length, GPUs, tokens of a step, tokens of a pass, overrides, GiB at the peak) of all rows."""
    found = []
    for path in sorted((ROOT / "kernels" / "benchmarks" / "results").glob("train_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        words = shlex.split(result["command"])
        shared = {
            "model": words[3],
            "gpus": result.get("world_size"),
            "overrides": [word for word in words[4:] if "=" in word],
            **{key: result.get(key) for key in ("tokens_per_step", "micro_tokens")},
        }
        for row in result["rows"]:
            of = {key: row.get(key, value) for key, value in shared.items()}
            if row["peak_gib"] and row["kind"] in ("tnl", "llama"):
                found.append((of["model"], row["kind"], row["length"], *list(of.values())[1:], row["peak_gib"]))
    return found


@pytest.mark.parametrize(
    ("model", "kind", "length", "gpus", "overrides", "tokens_per_step", "micro_tokens", "peak_gib"), measured_peaks()
)
def test_the_plan_is_what_was_measured_on_gpus(
    model, kind, length, gpus, overrides, tokens_per_step, micro_tokens, peak_gib
):
    on_gpu = ["train.precision=bf16", "train.zero_stage=2"]  # what tnl bench train takes there unless it is told
    tree = configuration.load(ModelSettings, f"model/{model}").model_dump(mode="json")
    place = Place(0, gpus, torch.device("cpu"))
    settings = settings_of(tree, kind, length, tokens_per_step, micro_tokens, place, [*on_gpu, *overrides])
    assert memory_plan(settings, gpus).peak / GIB == pytest.approx(peak_gib, rel=0.03)


# DeepSpeed's tensors


def small_run(*overrides: str) -> PretrainSettings:
    """A run whose weights and activations are of like size, and buckets that do not hide them."""
    zero = "{reduce_bucket_size: 500000, allgather_bucket_size: 200000, stage3_prefetch_bucket_size: 1000}"
    sizes = ["hidden_size=192", "glu_dim=384", "num_layers=3", "num_heads=3"]
    return tiny_run(
        Path("unused"),
        Path("unused"),
        *(f"model.{size}" for size in sizes),
        "train.sequence_length=192",
        f"deepspeed.zero_optimization={zero}",
        *overrides,
    )


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    # torch.compile leaves tensors of other classes behind, which have no memory.
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    sizes = {}
    for storage in (x.untyped_storage() for x in tensors):
        with contextlib.suppress(RuntimeError):  # torch.compile leaves tensors without memory behind
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def allocations(function) -> tuple[int, int]:
    """Bytes on the CPU that ``function()`` allocates at its peak, and that it leaves."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak, total


def engine_bytes(settings: PretrainSettings) -> tuple[int, int]:
    """What an engine holds after a step, and at most more in the next."""
    from tnl.training.engine import build_engine, init_ranks

    before = live_bytes()
    config = model_config(settings.model, settings.train.sequence_length)
    engine = build_engine(settings, model_class(config)(config), init_ranks())
    engine.train()
    ids = random_ids(2, 192, vocab=settings.model.vocab_size)
    passes = settings.train.global_batch_size // 2

    def step():
        for _ in range(passes):
            loss = engine(input_ids=ids, labels=ids, use_cache=False).loss_sum * 0.01
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()

    step()  # the first one makes the moments
    resting = live_bytes() - before
    peak, _ = allocations(step)
    return resting, peak


def resting_bytes(settings: PretrainSettings) -> float:
    """What is planned between two steps on the GPU."""
    step = memory_plan(settings, 1).moments["optimizer step"]
    return step["weights"] + step["optimizer"] + step["ZeRO buffers"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "precision", "stage", "passes", "checkpointing"),
    [
        ("tnl", "fp32", 0, 2, "full"),
        ("tnl", "fp32", 1, 2, "none"),
        ("tnl", "fp32", 2, 1, "none"),
        ("tnl", "fp32", 3, 2, "none"),
        ("tnl", "bf16", 2, 2, "full"),
        ("tnl", "bf16", 3, 2, "full"),
        ("llama", "fp32", 1, 2, "none"),
        ("llama", "bf16", 2, 2, "full"),
    ],
)
def test_memory_is_what_an_engine_holds(kind, precision, stage, passes, checkpointing):
    settings = small_run(
        f"model.kind={kind}",
        f"train.precision={precision}",
        f"train.zero_stage={stage}",
        f"train.global_batch_size={2 * passes}",
        f"train.activation_checkpointing={checkpointing}",
    )
    resting, peak = engine_bytes(settings)
    N = num_parameters(model_config(settings.model, settings.train.sequence_length))
    assert resting_bytes(settings) + 4 * N * (stage == 3) == pytest.approx(resting, rel=0.03)
    assert memory_plan(settings, 1).peak == pytest.approx(resting + peak, rel=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("precision", "stage", "passes", "parameters"),
    [("bf16", 2, 2, "none"), ("fp32", 2, 2, "none"), ("bf16", 3, 1, "none"), ("bf16", 3, 2, "cpu")],
)
def test_what_offloading_takes_in_ram_is_what_an_engine_holds_beyond_the_gpu(precision, stage, passes, parameters):
    settings = small_run(
        f"train.precision={precision}",
        f"train.zero_stage={stage}",
        f"train.global_batch_size={2 * passes}",
        "train.offload_optimizer=cpu",
        f"train.offload_parameters={parameters}",
    )
    resting, _ = engine_bytes(settings)
    # On a CPU both are one memory. Buffers as large as the largest weight are not planned.
    largest = settings.model.vocab_size * settings.model.hidden_size
    held = resting - 2 * largest * (4 if precision == "fp32" else 2) * (stage == 2)
    plan = memory_plan(settings, 1)
    assert resting_bytes(settings) + sum(plan.ram.values()) == pytest.approx(held, rel=0.03)
    assert not plan.disk


def test_more_gpus_share_what_the_stage_shards():
    one, four = (memory_plan(small_run("train.zero_stage=3", "train.micro_batch_size=1"), n) for n in (1, 4))
    for part in ("weights", "optimizer", "gradients"):
        assert four.parts[part] == pytest.approx(one.parts[part] / 4, abs=1)
    two = memory_plan(small_run("train.zero_stage=2", "train.micro_batch_size=1"), 4)
    assert two.parts["weights"] == 4 * four.parts["weights"]
    assert two.parts["optimizer"] == four.parts["optimizer"]
    assert four.allowance > one.allowance


def test_slices_and_segments_of_a_window_take_its_share_of_activations():
    whole = memory_plan(small_run(), 2)
    sliced = memory_plan(small_run("train.sequence_parallel=2"), 2)
    cut = memory_plan(small_run("train.segment_length=96"), 2)
    for part in (sliced, cut):
        made = part.moments["loss"]
        assert made["activations"] == whole.moments["loss"]["activations"] // 2
        assert made["recurrent states"] > 0


def test_what_is_offloaded_is_not_on_the_gpu():
    stage = ["train.zero_stage=3", "train.micro_batch_size=1"]
    parts = memory_plan(small_run(*stage, "train.offload_optimizer=cpu", "train.offload_parameters=cpu"), 1).parts
    assert parts["weights"] == parts["optimizer"] == parts["gradients"] == 0
    assert parts["activations"] > 0


def test_each_gpu_offloads_its_share():
    keys = ["train.zero_stage=3", "train.micro_batch_size=1", "train.offload_path=/x"]
    keys += ["train.offload_optimizer=nvme", "train.offload_parameters=nvme"]
    one, four = (memory_plan(small_run(*keys), n) for n in (1, 4))
    N = num_parameters(small_run().model.to_config())
    assert one.disk == {"optimizer": 12 * N, "gradients": 4 * N, "weights": 4 * N}
    assert one.ram == {"gradients": 4 * N}
    for part, size in one.disk.items():
        assert four.disk[part] == pytest.approx(size / 4, abs=1)


# What is printed


def test_time_and_what_fits():
    settings = configuration.load(PretrainSettings, "pretrain/tnl-1b", ["logging.peak_tflops=1000"])
    found = figures(settings, gpus=8, mfu=0.4, tokens=10**12, gpu_memory=[1.0, 80.0])
    rate = 0.4 * 1000e12 / found["flops_per_token"]
    assert found["time"]["tokens_per_gpu_per_second"] == pytest.approx(rate)
    assert found["time"]["gpu_hours"] == pytest.approx(10**12 / rate / 3600)
    assert found["time"]["seconds"] == pytest.approx(10**12 / rate / 8)
    assert found["memory"]["fits"] == {"1 GiB": False, "80 GiB": True}
    assert found["memory"]["peak_bytes"] == sum(found["memory"]["parts_bytes"].values())
    assert found["memory"]["peak_bytes"] == max(found["memory"]["moments_bytes"].values())


def test_the_command_prints_and_writes_json(tmp_path, tnl_command):
    file = tmp_path / "plan.json"
    code, out, err = tnl_command("plan", "pretrain/tnl-7b", "--gpus", "64", "--tokens", "1.5T", "--json", file)
    assert (code, err) == (0, "")
    assert "6,836,719,616" in out
    found = json.loads(file.read_text())
    assert found["time"]["tokens"] == 1_500_000_000_000
    assert f"{found['memory']['peak_bytes'] / GIB:.2f}" in out
    assert "offloaded" not in out


def test_the_command_plans_a_llama_and_says_what_is_offloaded(tmp_path, tnl_command):
    file = tmp_path / "plan.json"
    keys = ["model.kind=llama", "train.offload_optimizer=cpu", "train.reduce_gradients=every_pass"]
    code, out, err = tnl_command("plan", "pretrain/tnl-1b", *keys, "--gpus", "4", "--json", file)
    assert (code, err) == (0, "")
    found = json.loads(file.read_text())
    assert found["parameters"] == 1_016_137_728
    ram = found["memory"]["ram_bytes"]
    assert ram["optimizer"] == 12 * 1_016_137_728 // 4
    assert "offloaded by each of 4 process(es), GiB" in out
    assert f"all, RAM {sum(ram.values()) / GIB:.2f}" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "7"], "train.global_batch_size: 512 is no multiple of train.micro_batch_size 4 x 7 processes = 28"),
        (["--gpus", "3", "train.sequence_parallel=2"], "train.sequence_parallel: 3 process"),
        (["--tokens", "many"], "--tokens: 'many' is no number of tokens"),
        (["--gpu-memory", "80,big"], "--gpu-memory: '80,big' is no list of GiB"),
        (["--json", "no/such/folder/plan.json"], "no/such/folder/plan.json: "),
    ],
)
def test_bad_input_is_one_message(arguments, message, tnl_command):
    code, _, err = tnl_command("plan", "pretrain/tnl-1b", *arguments)
    assert code in (2, 73)
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "number"), [("300B", 3 * 10**11), ("1.4t", 14 * 10**11), ("500M", 5 * 10**8), ("7", 7)]
)
def test_tokens(text, number):
    assert read_tokens(text) == number


def test_sizes_are_sorted_numbers():
    assert read_sizes("80, 24,24") == [24.0, 80.0]
    with pytest.raises(ConfigError):
        read_sizes("0")


@pytest.mark.parametrize("command", ["plan", "pretrain"])
def test_a_configuration_of_tuning_is_refused(command, tnl_command):
    code, _, err = tnl_command(command, "finetune/alpaca-7b-lora-zero3")
    assert code == 2
    assert "has a method section, so it is for tnl finetune; give tnl pretrain and tnl plan a configuration of" in err
    assert "Traceback" not in err


def test_deepspeed_is_not_imported():
    program = (
        "import sys; from tnl import cli; sys.argv = ['tnl', 'plan', 'pretrain/quickstart']; "
        "cli.app(standalone_mode=False); sys.exit('deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
