"""The attention ops against their definition in fp64, forward and backward, and the properties that callers rely on."""

import pytest
import torch
import torch.nn.functional as F
from tnl_kernels import (
    lightning_attention,
    lightning_attention_packed,
    lightning_attention_state,
    lightning_attention_step,
)
from tnl_kernels.naive import (
    naive_lightning_attention,
    naive_lightning_attention_packed,
    naive_lightning_attention_step,
)

from tests.attention_inputs import (
    ALIBI,
    check_attention,
    check_attention_packed,
    check_attention_state,
    int32,
    random_inputs,
    random_packed,
    with_gradients,
)
from tests.closeness import assert_close


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 500, 1000])
def test_equals_the_definition_at_every_length(T):
    check_attention(lightning_attention, *random_inputs(T, 16, 32, B=2, H=5), torch.tensor([0.0, *ALIBI, 0.5, 50.0]))


@pytest.mark.parametrize(("K", "V"), [(16, 16), (32, 32), (96, 96), (128, 128), (128, 16), (20, 96)])
def test_equals_the_definition_at_every_head_dim(K, V):
    check_attention(lightning_attention, *random_inputs(150, K, V), torch.tensor(ALIBI))


@pytest.mark.parametrize(
    "cu_seqlens",
    [[0, 300], [0, 0, 64, 65, 65, 193, 300], [0, 1, 2, 3, 300, 300], [0, 127, 300], [0, 64, 128, 192, 256, 300]],
)
def test_packed_documents_equal_the_definition(cu_seqlens):
    inputs = random_inputs(300, 16, 24, N=len(cu_seqlens) - 1)
    check_attention(lightning_attention, *inputs, torch.tensor(ALIBI), int32(*cu_seqlens))


def test_documents_do_not_see_each_other():
    q, k, v, *_ = random_inputs(200, 16, 16)
    slopes = torch.tensor(ALIBI)
    o, _ = lightning_attention(q, k, v, slopes, cu_seqlens=torch.tensor([0, 70, 200], dtype=torch.int32))
    for start, end in ((0, 70), (70, 200)):
        alone, _ = lightning_attention(q[:, start:end], k[:, start:end], v[:, start:end], slopes)
        assert_close("o", o[:, start:end], alone.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    check_attention(lightning_attention, *random_inputs(300, 64, 64, dtype=dtype), torch.tensor(ALIBI))


def test_whole_equals_pieces_forward_and_backward():
    q, k, v, state, do, dfinal = random_inputs(300, 16, 16, B=2)
    slopes = torch.tensor(ALIBI)

    def whole(q, k, v, state):
        return lightning_attention(q, k, v, slopes, initial_state=state, output_final_state=True)

    def pieces(q, k, v, state):
        outputs = []
        for x in zip(*(x.split([1, 99, 64, 136], 1) for x in (q, k, v)), strict=True):
            o, state = lightning_attention(*x, slopes, initial_state=state, output_final_state=True)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    actual = with_gradients(pieces, (q, k, v, state), (do, dfinal))
    expected = with_gradients(whole, (q, k, v, state), (do, dfinal))
    for name, a, e in zip(("o", "final", "dq", "dk", "dv", "dstate"), sum(actual, ()), sum(expected, ()), strict=True):
        assert_close(name, a, e)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 1, 130, 200]])
def test_state_op_equals_the_final_state(cu_seqlens):
    N = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    q, k, v, state, _, dstate = random_inputs(200, 16, 24, N=N)
    slopes = torch.tensor(ALIBI)

    actual, *_ = check_attention_state(lightning_attention_state, k, v, state, dstate, slopes, cu_seqlens)
    _, final = lightning_attention(q, k, v, slopes, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
    assert torch.equal(actual, final)


def test_final_state_of_an_empty_sequence_is_the_initial_state():
    q, k, v, state, _, _ = random_inputs(0, 16, 24, B=2)
    slopes = torch.tensor(ALIBI)
    o, final = lightning_attention(q, k, v, slopes, initial_state=state, output_final_state=True)
    assert o.shape == (2, 0, 2, 24)
    assert torch.equal(final, state)
    o, final = lightning_attention(q, k, v, slopes, output_final_state=True)
    assert torch.equal(final, torch.zeros(2, 2, 16, 24))
    _, gradients = with_gradients(lambda k, v: lightning_attention_state(k, v, slopes), (k, v), state)
    assert [x.shape for x in gradients] == [k.shape, v.shape]


def test_gradients_of_one_output_alone():
    q, k, v, _, do, dfinal = random_inputs(100, 16, 16)
    slopes = torch.tensor(ALIBI)
    for i_output, doutput in enumerate((do, dfinal)):

        def of(op, i_output=i_output, slopes=slopes):
            return lambda q, k, v: op(q, k, v, slopes.to(q.dtype), output_final_state=True)[i_output]

        _, actual = with_gradients(of(lightning_attention), (q, k, v), doutput)
        wide = [x.double() for x in (q, k, v)]
        _, expected = with_gradients(of(naive_lightning_attention), wide, doutput.double())
        for name, a, e in zip(("dq", "dk", "dv"), actual, expected, strict=True):
            assert_close(name, a, e)


def test_a_later_token_changes_nothing_earlier():
    q, k, v, *_ = random_inputs(200, 32, 32)
    slopes = torch.tensor(ALIBI)
    o, _ = lightning_attention(q, k, v, slopes)
    for t in (1, 63, 64, 150, 199):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, t] += 1
        o_changed, _ = lightning_attention(*changed, slopes)
        assert torch.equal(o[:, :t], o_changed[:, :t])
        assert not torch.equal(o[:, t], o_changed[:, t])


def test_runs_are_bitwise_equal():
    q, k, v, state, do, dfinal = random_inputs(500, 32, 32)
    slopes = torch.tensor(ALIBI)

    def run(q, k, v, state):
        return lightning_attention(q, k, v, slopes, initial_state=state, output_final_state=True)

    first, second = (sum(with_gradients(run, (q, k, v, state), (do, dfinal)), ()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_views_of_any_strides_are_taken():
    packed = torch.randn(2, 100, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    slopes = torch.tensor(ALIBI)

    def run(op, packed, slopes):
        q, k, v = packed.unbind(3)
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        v = v[:, :, :1].expand(-1, -1, 2, -1)
        return op(q, k.flip(-1), v, slopes)[0]

    actual, gradient = with_gradients(
        lambda x: run(lightning_attention, x, slopes), [packed], torch.ones(2, 100, 2, 16)
    )
    expected, wide_gradient = with_gradients(
        lambda x: run(naive_lightning_attention, x, slopes.double()),
        [packed.double()],
        torch.ones(2, 100, 2, 16).double(),
    )
    assert_close("o", actual, expected)
    assert_close("dpacked", gradient[0], wide_gradient[0])


def test_inputs_are_left_as_they_were():
    inputs = random_inputs(100, 16, 16)
    before = [x.clone() for x in inputs]
    q, k, v, state, do, dfinal = inputs
    leaves = [x.requires_grad_() for x in (q, k, v, state)]
    outputs = lightning_attention(q, k, v, torch.tensor(ALIBI), initial_state=state, output_final_state=True)
    torch.autograd.grad(outputs, leaves, (do, dfinal))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_autocast_does_not_change_the_precision():
    q, k, v, *_ = random_inputs(100, 32, 32)
    slopes = torch.tensor(ALIBI)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, _ = lightning_attention(q, k, v, slopes)
        state = lightning_attention_state(k, v, slopes)
        step = lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], slopes, torch.zeros(1, 2, 32, 32))
    assert torch.equal(o, lightning_attention(q, k, v, slopes)[0])
    assert torch.equal(state, lightning_attention_state(k, v, slopes))
    assert_close("step", step, o[:, 0].double())


@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 3, 4, 70]])
def test_gradcheck(cu_seqlens):
    N = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    q, k, v, state, *_ = random_inputs(70, 3, 2, N=N, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, state)]
    slopes = torch.tensor([0.1, 0.02])
    options = dict(cu_seqlens=cu_seqlens)

    def attention(q, k, v, state):
        return lightning_attention(q, k, v, slopes, initial_state=state, output_final_state=True, **options)

    def packed(qkvu, state):
        return lightning_attention_packed(
            qkvu, slopes, num_heads=2, initial_state=state, output_final_state=True, **options
        )

    qkvu = torch.randn(1, 70, 4 * 2 * 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    square = state.detach()[:, :, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(attention, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(packed, (qkvu.requires_grad_(), square), fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda k, v, state: lightning_attention_state(k, v, slopes, initial_state=state, **options),
        leaves[1:],
        fast_mode=True,
    )


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 1, 130, 200]])
def test_packed_op_equals_the_definition(activation, dtype, cu_seqlens):
    N = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    _, _, _, state, do, dfinal = random_inputs(200, 16, 16, N=N, dtype=dtype)
    qkvu, du = random_packed(200, 16, dtype=dtype)
    check_attention_packed(
        lightning_attention_packed,
        qkvu,
        du,
        state,
        do,
        dfinal,
        torch.tensor(ALIBI),
        cu_seqlens,
        activation=activation,
    )


def test_packed_op_equals_the_unpacked_op():
    qkvu = torch.randn(2, 150, 4 * 2 * 32, generator=torch.Generator().manual_seed(0))
    slopes = torch.tensor(ALIBI)

    def packed(qkvu):
        o, u, _ = lightning_attention_packed(qkvu, slopes, num_heads=2)
        return o.flatten(2) * u

    def unpacked(qkvu):
        q, k, v, u = qkvu.unflatten(-1, (4, 2, 32)).unbind(2)
        o, _ = lightning_attention(F.silu(q), F.silu(k), v, slopes)
        return o.flatten(2) * u.flatten(2)

    actual, gradient = with_gradients(packed, [qkvu], torch.ones(2, 150, 64))
    expected, expected_gradient = with_gradients(unpacked, [qkvu], torch.ones(2, 150, 64))
    assert_close("o * u", actual, expected)
    assert_close("dqkvu", gradient[0], expected_gradient[0])


def test_packed_op_keeps_u_as_a_view_and_takes_missing_gradients():
    qkvu = torch.randn(1, 70, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    o, u, final = lightning_attention_packed(qkvu, torch.tensor(ALIBI), num_heads=2)
    assert final is None
    assert u.untyped_storage().data_ptr() == qkvu.untyped_storage().data_ptr()
    (of_u,) = torch.autograd.grad(u.sum(), qkvu, retain_graph=True)
    assert torch.equal(of_u, torch.cat((torch.zeros(1, 70, 48), torch.ones(1, 70, 16)), -1))
    (of_o,) = torch.autograd.grad(o.sum(), qkvu)
    assert torch.equal(of_o[..., 48:], torch.zeros(1, 70, 16))


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_sequence(activation, dtype):
    qkvu = torch.randn(2, 70, 4 * 2 * 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    slopes = torch.tensor(ALIBI)
    expected, _, final = naive_lightning_attention_packed(
        qkvu.double(), slopes.double(), num_heads=2, activation=activation, output_final_state=True
    )
    q, k, v, _ = qkvu.unflatten(-1, (4, 2, 16)).unbind(2)
    state = torch.zeros(2, 2, 16, 16)
    steps = [
        lightning_attention_step(q[:, t], k[:, t], v[:, t], slopes, state, activation=activation) for t in range(70)
    ]
    assert_close("o", torch.stack(steps, 1), expected)
    assert_close("state", state, final)


def test_step_reads_and_writes_the_slots_only():
    q, k, v, state, *_ = random_inputs(4, 16, 24, N=5)
    q, k, v = q[0], k[0], v[0]
    slopes = torch.tensor(ALIBI)
    slots = torch.tensor([3, -1, 0, -7])
    expected_state = state.double()
    expected = naive_lightning_attention_step(
        q.double(), k.double(), v.double(), slopes.double(), expected_state, slots=slots
    )
    before = state.clone()
    o = lightning_attention_step(q, k, v, slopes, state, slots=slots)
    assert_close("o", o, expected)
    assert_close("state", state, expected_state)
    assert torch.equal(o[[1, 3]], torch.zeros(2, 2, 24))
    assert torch.equal(state[[1, 2, 4]], before[[1, 2, 4]])


def test_step_leaves_no_graph():
    q = torch.randn(1, 2, 16, requires_grad=True)
    state = torch.zeros(1, 2, 16, 16)
    o = lightning_attention_step(q, q, q, torch.tensor(ALIBI), state)
    assert not o.requires_grad
    assert not state.requires_grad


GOOD = dict(q=torch.zeros(1, 8, 2, 4), k=torch.zeros(1, 8, 2, 4), v=torch.zeros(1, 8, 2, 6), slopes=torch.tensor(ALIBI))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(q=torch.zeros(1, 8, 2, 5)), r"q: got shape \(1, 8, 2, 5\), expected \[B, T, H, K\], the shape of k"),
        (dict(q=torch.zeros(1, 8, 2, 4).bfloat16()), "q: got dtype bfloat16, expected float32"),
        (dict(k=torch.zeros(8, 2, 4)), r"k: got shape \(8, 2, 4\), expected \[B, T, H, K\]"),
        (dict(k=torch.zeros(1, 8, 2, 4, dtype=torch.int64)), "k: got dtype int64, expected float32, bfloat16"),
        (dict(v=torch.zeros(1, 7, 2, 6)), r"v: got shape \(1, 7, 2, 6\), expected \[B, T, H, V\] = \(1, 8, 2, 6\)"),
        (dict(slopes=torch.tensor([0.1])), r"slopes: got shape \(1,\), expected \[H\] = \(2,\)"),
        (dict(slopes=torch.tensor([0.5, -0.5])), r"slopes: got \[0.5, -0.5\], expected finite values >= 0"),
        (dict(slopes=torch.tensor([0.5, float("nan")])), "slopes: got .*nan.*, expected finite values >= 0"),
        (dict(slopes=torch.tensor(ALIBI).bfloat16()), "slopes: got dtype bfloat16, expected float32, float64"),
        (dict(initial_state=torch.zeros(1, 2, 6, 4)), r"initial_state: got shape .* \[N, H, K, V\] = \(1, 2, 4, 6\)"),
        (dict(initial_state=torch.zeros(1, 2, 4, 6).bfloat16()), "initial_state: got dtype bfloat16, expected float32"),
        (dict(cu_seqlens=torch.tensor([0, 8])), "cu_seqlens: got dtype int64, expected int32"),
        (dict(cu_seqlens=int32(0)), r"cu_seqlens: got shape \(1,\), expected \[N \+ 1\]"),
        (dict(cu_seqlens=int32(1, 8)), "cu_seqlens: got 1 as the first offset, expected 0"),
        (dict(cu_seqlens=int32(0, 7)), "cu_seqlens: got 7 as the last offset, expected T = 8"),
        (dict(cu_seqlens=int32(0, 5, 3, 8)), r"cu_seqlens: got decreasing offsets \[0, 5, 3, 8\]"),
        (dict(cu_seqlens=int32(0, 4, 8), initial_state=torch.zeros(1, 2, 4, 6)), r"initial_state: .* = \(2, 2, 4, 6\)"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        lightning_attention(**{**GOOD, **wrong})


def test_packing_documents_needs_one_row():
    q, k, v, *_ = random_inputs(8, 4, 4, B=2)
    with pytest.raises(ValueError, match="cu_seqlens: got a batch of B = 2, expected B = 1"):
        lightning_attention(q, k, v, torch.tensor(ALIBI), cu_seqlens=int32(0, 8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(activation="gelu"), "activation: got 'gelu', expected one of 'silu', None"),
        (dict(num_heads=3), r"qkvu: got a last dimension of 64, expected a multiple of 4 \* num_heads = 12"),
        (dict(num_heads=4), r"slopes: got shape \(2,\), expected \[H\] = \(4,\)"),
        (dict(initial_state=torch.zeros(1, 2, 8, 4)), r"initial_state: got shape .* \[N, H, K, K\] = \(1, 2, 8, 8\)"),
    ],
)
def test_wrong_arguments_of_the_packed_op_are_named(wrong, message):
    good = dict(qkvu=torch.zeros(1, 8, 64), slopes=torch.tensor(ALIBI), num_heads=2)
    with pytest.raises(ValueError, match=message):
        lightning_attention_packed(**{**good, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(state=torch.zeros(2, 2, 4, 6)), r"state: got shape \(2, 2, 4, 6\), .* = \(3, 2, 4, 6\)"),
        (dict(state=torch.zeros(3, 2, 4, 6).double()), "state: got dtype float64, expected float32"),
        (dict(slots=torch.tensor([0, 1])), r"slots: got shape \(2,\), expected \[B\] = \(3,\)"),
        (dict(slots=torch.tensor([0, 1, 3])), "slots: got 3, expected less than the 3 slots of state"),
        (dict(slots=torch.tensor([1, 1, -1])), r"slots: got a slot twice in \[1, 1, -1\]"),
        (dict(slots=torch.tensor([0.0, 1.0, 2.0])), "slots: got dtype float32, expected int32, int64"),
        (dict(activation="relu"), "activation: got 'relu', expected one of"),
    ],
)
def test_wrong_arguments_of_the_step_are_named(wrong, message):
    x = torch.zeros(3, 2, 4)
    good = dict(q=x, k=x, v=torch.zeros(3, 2, 6), slopes=torch.tensor(ALIBI), state=torch.zeros(3, 2, 4, 6))
    with pytest.raises(ValueError, match=message):
        lightning_attention_step(**{**good, **wrong})
