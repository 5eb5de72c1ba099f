"""Windows shared by several ranks: loss and gradients of one rank, traffic that does not grow, the same training."""

import pytest
import torch
import torch.distributed as dist

from tests.rank_worker import WORLD, found_by_ranks, run_worker
from tests.sequence_worker import CASES, RUNS, SIZES, TRAFFIC_STARTS
from tests.tiny_corpus import tiny_shards
from tests.tiny_model import random_ids, tiny_config, tiny_model
from tests.tiny_run import rows, tiny_run, tiny_tree
from tnl.data.loader import TrainLoader, num_labelled
from tnl.data.shards import ShardSet
from tnl.errors import ConfigError
from tnl.model.loss import IGNORE_INDEX
from tnl.model.sequence_parallel import SequenceShard, exchanged_bytes
from tnl.training.engine import deepspeed_config
from tnl.training.pretrain import pretrain
from tnl.training.status import read_status

RELATIVE = 1e-5
STEPS = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def folder(shards, tmp_path_factory):
    """What four ranks left, from one start of the processes."""
    folder = tmp_path_factory.mktemp("ranks")
    tree = tiny_tree(shards, folder / "run")
    tree["train"]["steps"] = STEPS
    tree["checkpoint"] = {"every": STEPS - 1}
    run_worker("sequence_worker.py", tree, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return found_by_ranks(folder)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_one_rank(found, case, size):
    for rank in found:
        error, worst = rank["errors"][f"{case} on {size}"]
        assert error <= RELATIVE, f"{worst}: relative RMS error {error:.1e}"


def test_traffic_is_one_state_per_layer_and_direction_and_does_not_depend_on_the_length(found):
    per_layer = exchanged_bytes(tiny_config(), num_windows=len(TRAFFIC_STARTS), size=WORLD)
    assert per_layer[0] == 2 * per_layer[1] > 0  # LRPE doubles the width of keys
    for rank in found:
        assert rank["traffic"]["16"] == rank["traffic"]["160"] == per_layer + per_layer[::-1]


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    """The run folder of one process with whole windows."""
    output = tmp_path_factory.mktemp("alone") / "run"
    pretrain(tiny_run(shards, output, f"train.steps={STEPS}"))
    return output


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_ranks_that_share_windows_is_the_run_of_one(folder, alone, name):
    for kind, keys in (("train", ("loss", "grad_norm", "tokens")), ("evaluation", ("loss", "num_predicted"))):
        expected, actual = rows(alone, kind), rows(folder / name, kind)
        assert len(expected) == len(actual) > 0
        for key in keys:
            values = [[row[key] for row in found] for found in (actual, expected)]
            assert values[0] == pytest.approx(values[1], rel=RELATIVE), (kind, key)


def test_a_resumed_run_repeats_its_steps_bit_for_bit(found):
    for rank in found:
        assert len(rank["straight"]) == STEPS
        assert rank["resumed"] == rank["straight"]


def test_the_rank_that_fails_says_why_and_not_those_that_wait_for_it(folder):
    status = read_status(folder / "failed")
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert status["error"].startswith("rank 2 is out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_the_run_prints_what_ranks_receive(folder):
    assert (
        "sequence parallel: 4 ranks share a window, 8 tokens each; a layer receives 0.023 MiB at most, a forward pass "
        "0.035 MiB and a backward pass the same, however long the window"
    ) in (folder / "printed").read_text()


def whole_windows(batch, length):
    """input_ids and what each token is asked to predict, both [B, length], of a batch of whole windows."""
    labels = torch.full_like(batch["labels"], IGNORE_INDEX)
    labels[:, :-1] = batch["labels"][:, 1:]
    return batch["input_ids"].view(-1, length), labels.view(-1, length)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "one text"])
@pytest.mark.parametrize("size", [2, 4, 32])
def test_slices_of_all_ranks_side_by_side_are_the_windows(shards, size, packing):
    length = 64
    piece = length // size
    shards = ShardSet.open(shards)
    whole = TrainLoader(shards, length, 6, 3, packing=packing)
    shared = [
        TrainLoader(shards, length, 6, 3, packing=packing, sequence_rank=r, sequence_size=size) for r in range(size)
    ]
    last = 2 * whole.num_windows // 6
    for step, *slices in zip(whole.steps(0, last), *(loader.steps(0, last) for loader in shared), strict=True):
        for batch, *parts in zip(step, *slices, strict=True):
            ids, labels = whole_windows(batch, length)
            assert torch.equal(torch.cat([part["input_ids"].view(3, piece) for part in parts], 1), ids)
            assert torch.equal(torch.cat([part["shift_labels"].view(3, piece) for part in parts], 1), labels)
            assert sum(map(num_labelled, parts)) == num_labelled(batch)
            assert all(torch.equal(part["sample_ids"], batch["sample_ids"]) for part in parts)
            bounds = batch["cu_seqlens"].tolist() if packing else range(0, 3 * length + 1, length)
            for rank, part in enumerate(parts):
                for i in range(3):
                    begin = i * length + rank * piece
                    before = begin - max(bound for bound in bounds if bound <= begin)
                    after = min(bound for bound in bounds if bound >= begin + piece) - begin - piece
                    assert (part["tokens_before"][i], part["tokens_after"][i]) == (before, after)
                    if packing:
                        own = [bound - begin for bound in bounds if begin < bound < begin + piece]
                        here = [b - i * piece for b in part["cu_seqlens"].tolist() if 0 < b - i * piece < piece]
                        assert own == here
                assert packing or part["cu_seqlens"] is None


@pytest.fixture
def group(tmp_path):
    """A group of this process alone; some other test may have left one."""
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    if own:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("num_windows", "arguments", "message"),
    [
        (3, {}, r"3 windows do not fit an input of \[B, T\] = \(2, 9\)"),
        (1, {"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "B = 1"),
        (2, {"attention_mask": torch.ones(2, 9)}, "goes with neither attention_mask"),
        (2, {"use_cache": True}, "goes with neither"),
    ],
)
def test_a_shard_that_does_not_fit_the_input_is_refused(group, num_windows, arguments, message):
    counts = torch.zeros(num_windows, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        tiny_model()(random_ids(2, 9), sequence_shard=SequenceShard(group, counts, counts), **arguments)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.sequence_parallel=3"], r"train\.sequence_length: 32 is no multiple of sequence_parallel 3"),
        (["train.sequence_parallel=0"], r"train\.sequence_parallel: .*greater than or equal to 1"),
        (
            ["train.sequence_parallel=2", "train.segment_length=16"],
            r"train\.segment_length: does not go with sequence_parallel; set only one",
        ),
        (
            ["train.sequence_parallel=2", "model.kind=llama"],
            r"train\.sequence_parallel: model\.kind llama has no state to pass",
        ),
    ],
)
def test_settings_that_windows_cannot_be_shared_with_are_refused(shards, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny_run(shards, tmp_path, *overrides)


def test_ranks_and_batches_that_do_not_divide_are_refused(shards, tmp_path):
    settings = tiny_run(shards, tmp_path, "train.sequence_parallel=4", "train.micro_batch_size=4")
    assert deepspeed_config(settings, 4)["gradient_accumulation_steps"] == 1
    with pytest.raises(
        ConfigError, match=r"train\.sequence_parallel: 6 process\(es\) do not divide into groups of 4; "
    ):
        deepspeed_config(settings, 6)
    with pytest.raises(
        ConfigError, match=r"global_batch_size: 4 is no multiple of train\.micro_batch_size 4 x 2 groups .* = 8"
    ):
        deepspeed_config(settings, 8)
