"""Blocks shared by several ranks: loss and gradients of one rank, the same training, one whole export, refusals."""

import pytest
import torch
from safetensors.torch import load_file
from tnl_kernels.naive import naive_gated_srmsnorm
from tnl_kernels.split_norm import TORCH_PASSES, TRITON_PASSES, SplitGatedNorm

from tests.closeness import assert_close
from tests.rank_worker import WORLD, found_by_ranks, run_worker
from tests.tensor_worker import CASES, LENGTH, LOW_RANK, RUNS, SIZES, STILL
from tests.tiny_corpus import tiny_shards
from tests.tiny_model import tiny_config, tiny_model
from tests.tiny_run import rows, tiny_run, tiny_tree
from tnl.errors import CheckpointError, ConfigError
from tnl.model import TransnormerForCausalLM
from tnl.model.tensor_parallel import is_sliced, merged, reduced_bytes, slice_of, sliced_config
from tnl.training.commit import CheckpointStore
from tnl.training.engine import deepspeed_config
from tnl.training.export import export_run
from tnl.training.memory import memory_plan
from tnl.training.pretrain import pretrain

RELATIVE = 1e-5
RELATIVE_FP64 = 1e-10
HEADS = "model.num_heads=4"
STEPS = 5


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def folder(shards, tmp_path_factory):
    """What four ranks left, from one start of the processes."""
    folder = tmp_path_factory.mktemp("ranks")
    tree = tiny_tree(shards, folder / "run")
    tree["train"]["steps"], tree["checkpoint"]["every"], tree["model"]["num_heads"] = STEPS, 3, 4
    run_worker("tensor_worker.py", tree, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return found_by_ranks(folder)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_one_rank(found, case, size):
    for rank in found:
        error, worst = rank["errors"][f"{case} on {size}"]
        assert error <= RELATIVE_FP64, f"{worst}: relative RMS error {error:.1e}"


@pytest.mark.parametrize("index", [0, 1], ids=["u gate", "low-rank gate"])
def test_a_mixer_sums_once_in_each_direction_and_one_scalar_a_token_for_its_norm(found, index):
    config = tiny_config(**[{}, LOW_RANK][index])
    forward, backward = reduced_bytes(config, LENGTH, torch.float32)
    stream, layers = LENGTH * config.decoder_embed_dim * 4, config.decoder_layers
    for rank in found:
        summed = rank["traffic"][index]
        assert sum(summed) == layers * (forward + backward)
        assert summed.count(stream) == 4 * layers
        assert summed.count(LENGTH * 4) == 2 * layers


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    """Run folders of one process with the whole model, by the gate's rank."""
    outputs = {}
    for gate_dim in (None, 4):
        outputs[gate_dim] = tmp_path_factory.mktemp("alone") / "run"
        gate = [] if gate_dim is None else [f"model.gate_dim={gate_dim}"]
        pretrain(
            tiny_run(shards, outputs[gate_dim], f"train.steps={STEPS}", HEADS, "logging.layer_norms_every=1", *gate)
        )
    return outputs


def reference(alone, name):
    return alone[4 if "low-rank" in name else None]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_ranks_that_share_blocks_is_the_run_of_one(folder, alone, name):
    for kind, keys in (("train", ("loss", "grad_norm", "tokens")), ("evaluation", ("loss", "num_predicted"))):
        expected, actual = rows(reference(alone, name), kind), rows(folder / name, kind)
        assert len(expected) == len(actual) > 0
        for key in keys:
            values = [[row[key] for row in found] for found in (actual, expected)]
            assert values[0] == pytest.approx(values[1], rel=RELATIVE), (kind, key)


@pytest.mark.parametrize(
    "name", [name for name, overrides in RUNS.items() if "logging.layer_norms_every=1" in overrides]
)
def test_norms_of_the_blocks_are_those_of_whole_blocks(folder, alone, name):
    expected, actual = rows(alone[None], "layers"), rows(folder / name, "layers")
    assert len(actual) == STEPS
    for row, other in zip(actual, expected, strict=True):
        for norms in ("grad_norms", "state_norms"):
            assert row[norms] == pytest.approx(other[norms], rel=RELATIVE)


def test_a_resumed_run_repeats_its_steps_bit_for_bit(found):
    for rank in found:
        assert len(rank["straight"]) == STEPS
        assert rank["resumed"] == rank["straight"]


@pytest.mark.parametrize("name", RUNS)
def test_the_export_is_the_whole_model(folder, alone, tmp_path, name):
    weights = [
        load_file(export_run(run, tmp_path / str(i)) / "model.safetensors")
        for i, run in enumerate([folder / name, reference(alone, name)])
    ]
    assert weights[0].keys() == weights[1].keys()
    for key, weight in weights[0].items():
        assert weight.shape == weights[1][key].shape
        # Adam divides by the root of tiny moments: rounding of the summation order grows to 1e-4 in single weights.
        assert (weight - weights[1][key]).abs().max() < 2e-3, key


def test_drawn_weights_and_their_export_are_those_of_one_rank_bit_for_bit(folder, shards, tmp_path):
    pretrain(tiny_run(shards, tmp_path / "alone", HEADS, *STILL))
    runs = [folder / "still", tmp_path / "alone"]
    actual, expected = (
        load_file(export_run(run, tmp_path / f"{run.name}-export") / "model.safetensors") for run in runs
    )
    assert actual.keys() == expected.keys()
    for name, weight in actual.items():
        assert torch.equal(weight, expected[name]), name


def test_ranks_hold_equal_copies_of_what_is_not_sliced(folder):
    engine = CheckpointStore(folder / "ZeRO 0/checkpoints").path(STEPS) / "engine"
    parts = [torch.load(file, weights_only=True)["module"] for file in sorted(engine.glob("mp_rank_*"))]
    assert len(parts) == 2
    whole = [name for name in parts[0] if not is_sliced(name)]
    assert whole == ["model.embed_tokens.weight", "lm_head.weight"]
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in whole)


def test_a_checkpoint_without_the_files_of_some_rank_is_refused(folder, tmp_path):
    run = folder / "ZeRO 2, selective checkpointing"
    store = CheckpointStore(run / "checkpoints")
    files = [name for name in store.manifest(STEPS)["files"] if name.startswith("engine/")]
    assert len([name for name in files if "_optim_states" in name]) == WORLD
    assert len([name for name in files if "model_states" in name]) == 2
    lost = store.path(STEPS) / "engine/mp_rank_01_model_states.pt"
    lost.rename(tmp_path / "kept")
    try:
        with pytest.raises(CheckpointError, match=r"mp_rank_01_model_states\.pt: missing from the checkpoint"):
            export_run(run, tmp_path / "export", step=STEPS)
    finally:
        (tmp_path / "kept").rename(lost)


def test_the_run_prints_what_ranks_sum(folder):
    assert (
        "tensor parallel: 2 ranks share the heads and channels of every block, 2 heads each; a layer sums 0.016 MiB "
        "over them in a forward pass and 0.016 MiB in a backward pass"
    ) in (folder / "printed").read_text()


@pytest.mark.parametrize("values", [{}, LOW_RANK], ids=["u gate", "low-rank gate"])
@pytest.mark.parametrize("size", SIZES)
def test_slices_of_all_ranks_are_the_weights_and_hold_their_heads_of_each_block(values, size):
    model = tiny_model(**values)
    shapes = {name: p.shape for name, p in tiny_model(**values, decoder_layers=2).named_parameters()}
    own = sliced_config(model.config, size)
    for name, parameter in model.named_parameters():
        parts = [slice_of(name, parameter, rank, size) for rank in range(size)]
        assert torch.equal(merged(name, parts), parameter)
        assert (parts[0].shape == shapes[name]) == (not is_sliced(name))
    heads, width = model.config.decoder_attention_heads, model.config.head_dim
    packed = "qkv_proj" if values else "qkvu_proj"
    blocks = len(packed) - len("_proj")
    row = torch.arange(blocks * heads * width).unsqueeze(1)
    last = slice_of(f"model.layers.0.token_mixer.{packed}.weight", row, size - 1, size)
    kept = own.decoder_attention_heads * width
    expected = [block * heads * width + heads * width - kept + i for block in range(blocks) for i in range(kept)]
    assert last.flatten().tolist() == expected


@pytest.mark.parametrize("passes", [TORCH_PASSES, TRITON_PASSES], ids=["torch", "triton"])
@pytest.mark.parametrize("D", [96, 333])
def test_parts_of_the_gated_norm_are_those_of_the_whole(passes, D):
    draw = torch.Generator().manual_seed(0)
    device = "cuda" if passes is TRITON_PASSES and torch.cuda.is_available() else "cpu"
    o, dy = (torch.randn(2, 7, D, generator=draw).to(device) for _ in range(2))
    u = torch.randn(2, 7, 4 * D, generator=draw).to(device)[..., -D:]  # a view of a packed projection
    wide = [x.double().requires_grad_() for x in (o, u)]
    y = naive_gated_srmsnorm(*wide)
    do, du = torch.autograd.grad(y, wide, dy.double())
    sums = [(o.double() ** 2).sum(-1).float(), (o.double() * u * dy).sum(-1).float()]
    for part in (slice(0, D // 3), slice(D // 3, D)):
        own = [x[..., part].requires_grad_() for x in (o, u)]
        given = []

        def total(partial_sums, given=given):
            given.append(partial_sums.clone())
            partial_sums.copy_(sums[len(given) - 1])

        out = SplitGatedNorm.apply(*own, D, total, 1e-6, passes)
        gradients = torch.autograd.grad(out, own, dy[..., part])
        assert_close("squares", given[0], (o.double() ** 2)[..., part].sum(-1))
        assert_close("projection", given[1], (o.double() * u * dy)[..., part].sum(-1))
        assert_close("y", out.detach(), y.detach()[..., part])
        assert_close("do", gradients[0], do[..., part])
        assert_close("du", gradients[1], du[..., part])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.tensor_parallel=0"], r"train\.tensor_parallel: .*greater than or equal to 1"),
        (
            ["train.tensor_parallel=3"],
            r"train\.tensor_parallel: 3 does not divide model\.num_heads 4; set a divisor of both",
        ),
        (["train.tensor_parallel=4", "model.glu_dim=50"], r"tensor_parallel: 4 does not divide model\.glu_dim 50; set"),
        (["train.tensor_parallel=2", "train.zero_stage=3"], r"tensor_parallel: does not go with zero_stage 3, .*set"),
        (["train.tensor_parallel=2", "train.compile=true"], r"train\.compile: does not go with tensor_parallel; set"),
        (["train.tensor_parallel=2", "model.kind=llama"], r"train\.tensor_parallel: the blocks of model\.kind llama"),
        (
            ["train.tensor_parallel=2", "model.mixer_norm=layernorm"],
            r"train\.tensor_parallel: model\.mixer_norm layernorm is not computed over split heads; set simplermsnorm",
        ),
    ],
)
def test_settings_that_blocks_cannot_be_shared_with_are_refused(shards, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny_run(shards, tmp_path, HEADS, *overrides)


def test_a_configuration_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"3 does not divide model\.num_heads 4; set a divisor of both"):
        sliced_config(tiny_config(), 3)


def test_ranks_and_batches_that_do_not_divide_are_refused(shards, tmp_path):
    settings = tiny_run(shards, tmp_path, HEADS, "train.tensor_parallel=2", "train.micro_batch_size=4")
    assert deepspeed_config(settings, 2)["gradient_accumulation_steps"] == 1
    with pytest.raises(
        ConfigError, match=r"train\.tensor_parallel: 3 process\(es\) do not divide into groups of 2; st"
    ):
        deepspeed_config(settings, 3)
    with pytest.raises(ConfigError, match=r"global_batch_size: 4 is no multiple of .* 4 x 2 groups .* = 8"):
        deepspeed_config(settings, 4)
    both = tiny_run(shards, tmp_path, HEADS, "train.tensor_parallel=2", "train.sequence_parallel=2")
    with pytest.raises(
        ConfigError, match=r"train\.sequence_parallel x train\.tensor_parallel: 6 .* groups of 4; start"
    ):
        deepspeed_config(both, 6)


def test_the_plan_counts_the_parts_that_a_rank_holds(shards, tmp_path):
    whole = tiny_run(shards, tmp_path, HEADS, "train.zero_stage=1", "train.micro_batch_size=1")
    split = tiny_run(
        shards, tmp_path, HEADS, "train.zero_stage=1", "train.micro_batch_size=1", "train.tensor_parallel=2"
    )
    numbers = [
        sum(p.numel() for p in TransnormerForCausalLM(config).parameters())
        for config in (whole.model.to_config(), sliced_config(split.model.to_config(), 2))
    ]
    plans = [memory_plan(settings, gpus) for settings, gpus in ((whole, 2), (split, 4))]
    for plan, count in zip(plans, numbers, strict=True):
        assert plan.parts["weights"] == 4 * count
        assert plan.parts["optimizer"] == 12 * count / 2
    held = [plan.moments["loss"]["activations"] for plan in plans]
    assert held[0] / 2 < held[1] < held[0]
