"""The Triton form of the decoding step against the definition in fp64; without a GPU, in Triton's interpreter."""

import pytest
import torch
import torch._dynamo.testing
from tnl_kernels import lightning_attention_step
from tnl_kernels.naive import naive_lightning_attention_step
from torch import library

from tests.closeness import assert_close

pytest.importorskip("triton")

from tnl_kernels.step_triton import (
    lightning_attention_step_kernel,
    lightning_attention_step_op,
    step_tile,
    triton_lightning_attention_step,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1, 1), (1, 16), (16, 1), (48, 80), (80, 48), (96, 96), (128, 128), (192, 96), (256, 128), (128, 256)]
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def step_inputs(B, H, K, V, *, num_slots=None, dtype=torch.float32, seed=0):
    """q, k, v as views of one packed projection, slopes and a state."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(B, H * (2 * K + V), generator=generator).to(DEVICE, dtype)
    q, k, v = packed.split([H * K, H * K, H * V], 1)
    q, k, v = q.unflatten(1, (H, K)), k.unflatten(1, (H, K)), v.unflatten(1, (H, V))
    slopes = torch.tensor([2.0 ** (-8 * (i_h + 1) / H) for i_h in range(H)], device=DEVICE)
    state = torch.randn(B if num_slots is None else num_slots, H, K, V, generator=generator).to(DEVICE)
    return q, k, v, slopes, state


def slots_of(*slots, dtype=torch.int64):
    return torch.tensor(slots, dtype=dtype, device=DEVICE)


def check_against_definition(q, k, v, slopes, state, **options):
    """Output and every state near the definition in fp64. Returns the output."""
    expected_state = state.double()
    wide = (x.double() for x in (q, k, v, slopes))
    expected = naive_lightning_attention_step(*wide, expected_state, **options)
    o = triton_lightning_attention_step(q, k, v, slopes, state, **options)
    assert o.dtype == v.dtype
    assert_close("o", o, expected)
    assert_close("state", state, expected_state)
    return o


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(("K", "V"), SIZES)
def test_equals_the_definition_at_every_size(K, V, activation):
    check_against_definition(*step_inputs(2, 3, K, V), activation=activation)


@pytest.mark.gpu
@half
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(("K", "V"), SIZES)
def test_half_precision_is_rounded_once(K, V, activation, dtype):
    check_against_definition(*step_inputs(5, 4, K, V, dtype=dtype), activation=activation)


@pytest.mark.gpu
def test_many_rows_equal_the_definition():
    slots = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:150].to(DEVICE)
    q, k, v, slopes, state = step_inputs(150, 32, 128, 128, num_slots=200, dtype=torch.bfloat16)
    check_against_definition(q, k, v, slopes, state, slots=slots, activation="silu")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_choose_the_states_and_the_others_keep_their_bits(dtype):
    q, k, v, slopes, state = step_inputs(4, 2, 48, 80, num_slots=6)
    state[[1, 2, 5]] = float("nan")
    before = state.clone()
    slots = slots_of(4, -1, 0, -7, dtype=dtype)
    o = triton_lightning_attention_step(q, k, v, slopes, state, slots=slots)
    expected_state = before.double()
    expected = naive_lightning_attention_step(*(x.double() for x in (q, k, v, slopes)), expected_state, slots=slots)
    assert_close("o", o, expected)
    assert_close("state", state[[0, 4]], expected_state[[0, 4]])
    assert torch.equal(o[[1, 3]], torch.zeros_like(o[[1, 3]]))
    untouched = [1, 2, 3, 5]
    assert torch.equal(state[untouched].view(torch.int32), before[untouched].view(torch.int32))


def test_padding_with_nan_gives_zero():
    q, k, v, slopes, state = step_inputs(2, 2, 16, 24)
    q[1], k[1], v[1] = float("nan"), float("nan"), float("nan")
    before = state.clone()
    o = triton_lightning_attention_step(q, k, v, slopes, state, slots=slots_of(0, -1))
    assert torch.equal(o[1], torch.zeros_like(o[1]))
    assert torch.isfinite(o[0]).all()
    assert torch.equal(state[1], before[1])


def test_a_slot_beyond_the_table_gives_nan_and_changes_nothing():
    q, k, v, slopes, state = step_inputs(2, 2, 16, 24, num_slots=3)
    before = state.clone()
    o = triton_lightning_attention_step(q, k, v, slopes, state, slots=slots_of(3, 1))
    assert o[0].isnan().all()
    assert torch.isfinite(o[1]).all()
    assert torch.equal(state[[0, 2]], before[[0, 2]])


def test_a_state_of_any_strides():
    q, k, v, slopes, state = step_inputs(2, 3, 48, 20)
    table = torch.full((2, 4, 3, 48, 20), float("nan"), device=DEVICE)  # the states of four layers
    table[:, 2] = state
    check_against_definition(q, k, v, slopes, table[:, 2])
    assert table[:, [0, 1, 3]].isnan().all()
    check_against_definition(q, k, v, slopes, state.mT.contiguous().mT)
    check_against_definition(q, k, v, slopes, state.repeat_interleave(2, 3)[..., ::2])


def test_inputs_of_any_strides():
    q, k, v, slopes, state = step_inputs(3, 2, 16, 24)
    q, v = q.mT.contiguous().mT, v.transpose(0, 1).contiguous().transpose(0, 1)
    k = k.repeat_interleave(2, 2)[:, :, ::2]
    slopes = slopes.repeat_interleave(2)[::2]
    slots = slots_of(2, 9, 0, 9, 1, 9)[::2]
    check_against_definition(q, k, v, slopes, state, slots=slots, activation="silu")


def test_state_does_not_decay_at_slope_zero_and_vanishes_at_a_large_one():
    q, k, v, _, state = step_inputs(1, 2, 16, 24)
    check_against_definition(q, k, v, torch.tensor([0.0, 200.0], device=DEVICE), state)


def test_large_values_do_not_overflow_the_activation():
    q, k, v, slopes, state = step_inputs(2, 2, 16, 24)
    check_against_definition(q * 1e3, k * 1e3, v, slopes, state, activation="silu")


def test_two_runs_are_bitwise_equal():
    results = []
    for _ in range(2):
        q, k, v, slopes, state = step_inputs(3, 2, 96, 80)
        results.append((triton_lightning_attention_step(q, k, v, slopes, state, activation="silu"), state))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_empty_batch():
    q, k, v, slopes, state = step_inputs(0, 2, 16, 24, num_slots=3)
    before = state.clone()
    assert triton_lightning_attention_step(q, k, v, slopes, state, slots=slots_of()).shape == (0, 2, 24)
    assert torch.equal(state, before)


def test_leaves_no_graph():
    q, k, v, slopes, state = step_inputs(1, 2, 16, 24)
    o = triton_lightning_attention_step(q.requires_grad_(), k, v, slopes, state)
    assert not o.requires_grad
    assert not state.requires_grad


@pytest.mark.parametrize("slots", [None, (1, -1)])
def test_opcheck(slots):
    q, k, v, slopes, state = step_inputs(2, 2, 16, 24, num_slots=2)
    slots = None if slots is None else slots_of(*slots)
    library.opcheck(lightning_attention_step_op, (q, k, v, slopes, state, slots, "silu"))


def test_compiled_as_one_graph_and_once_for_all_batches():
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=count, dynamic=True)
    def step(q, k, v, slopes, state, slots):
        return triton_lightning_attention_step(q * 1.0, k, v, slopes, state, slots=slots, activation="silu") + 0.0

    for B in (3, 4, 5):
        q, k, v, slopes, state = step_inputs(B, 2, 16, 24, num_slots=6)
        slots = torch.arange(B, device=DEVICE)
        expected_state = state.clone()
        expected = triton_lightning_attention_step(q, k, v, slopes, expected_state, slots=slots, activation="silu")
        assert torch.equal(step(q, k, v, slopes, state, slots), expected)
        assert torch.equal(state, expected_state)
    assert count.frame_count == 1


@pytest.mark.gpu
def test_the_kernel_is_compiled_once_for_all_batches():
    counts = set()
    for B in (1, 2, 7, 16, 64):
        triton_lightning_attention_step(*step_inputs(B, 4, 112, 112))
        counts.add(len(lightning_attention_step_kernel.device_caches[torch.cuda.current_device()][0]))
    assert len(counts) == 1


@pytest.mark.gpu
def test_the_public_op_takes_this_form_on_a_gpu_and_runs_in_a_cuda_graph():
    q, k, v, slopes, state = step_inputs(4, 4, 64, 64, dtype=torch.bfloat16)
    slots = slots_of(2, 0, -1, 3)
    expected_state = state.clone()
    expected = [lightning_attention_step(q, k, v, slopes, expected_state, slots=slots).clone() for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    replayed_state = state.clone()
    with torch.cuda.graph(graph):
        o = lightning_attention_step(q, k, v, slopes, replayed_state, slots=slots)
    replayed_state.copy_(state)
    for value in expected:
        graph.replay()
        assert torch.equal(o, value)
    assert torch.equal(replayed_state, expected_state)


def test_tiles_of_small_and_large_heads():
    heads = {(128, 128): (32, 4), (64, 64): (64, 4), (256, 256): (16, 4), (16, 16): (16, 1), (1, 1): (1, 1)}
    heads |= {(4096, 64): (8, 8), (200, 100): (16, 4)}
    assert {head: step_tile(*head) for head in heads} == heads


def test_a_state_that_overlaps_itself_is_refused():
    q = k = v = torch.ones(2, 1, 4)
    with pytest.raises(ValueError, match=r"state: got strides \(0, 16, 4, 1\), expected elements of their own"):
        lightning_attention_step(q, k, v, torch.zeros(1), torch.zeros(1, 1, 4, 4).expand(2, 1, 4, 4))
