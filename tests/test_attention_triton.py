"""The Triton forms of attention over a sequence against the definition in fp64; without a GPU, in the interpreter."""

import pytest
import torch
import triton.language as tl
from tnl_kernels import (
    attention_kernels,
    attention_launch,
    lightning_attention,
    lightning_attention_packed,
    lightning_attention_state,
)
from tnl_kernels.attention_triton import triton_lightning_attention, triton_lightning_attention_state
from tnl_kernels.dispatch import FORM_OF_DEVICE
from tnl_kernels.naive import naive_lightning_attention
from tnl_kernels.packed_triton import triton_lightning_attention_packed
from tnl_kernels.tiles import BackwardTiles, Tiles

from tests.attention_inputs import (
    ALIBI,
    check_attention,
    check_attention_packed,
    check_attention_state,
    random_inputs,
    random_packed,
    with_gradients,
)
from tests.attention_inputs import int32 as cpu_int32
from tests.closeness import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Every kind of decay: none, one that is slow, ALiBi, one under which a token forgets its predecessor.
SLOPES = (0.0, 1e-4, ALIBI[0], 50.0)
# Two empty ones, two of one token, one that ends with a chunk, one that does not.
DOCUMENTS = (0, 0, 1, 2, 34, 34, 70)
# Segments begin at multiples of this. A compiled kernel has the number built in; the interpreter can take fewer rows.
ROWS = 128 if DEVICE == "cuda" else 16
packings = pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["", "documents"])


@pytest.fixture(autouse=True)
def _poison():
    """Every torch.empty is filled with NaN, so what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.zeros(1).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def segmented(monkeypatch):
    """A function that forces the number of segments."""
    if DEVICE == "cpu":
        monkeypatch.setattr(attention_kernels, "SEGMENT_ROWS", tl.constexpr(ROWS))

    def force(count):
        monkeypatch.setattr(attention_launch, "num_segments", lambda *args, **kwargs: count)

    return force


def decays(*values):
    return torch.tensor(values, device=DEVICE)


def int32(*values):
    return None if values == (None,) else cpu_int32(*values, device=DEVICE)


def problem(T=70, K=16, V=24, *, slopes=SLOPES, B=1, documents=None, dtype=torch.float32, seed=0):
    """q, k, v, state, do, dfinal, slopes, cu_seqlens."""
    N = B if documents is None else len(documents) - 1
    inputs = random_inputs(T, K, V, B=B, H=len(slopes), N=N, dtype=dtype, seed=seed, device=DEVICE)
    return *inputs, decays(*slopes), None if documents is None else int32(*documents)


def check_every_op(q, k, v, state, do, dfinal, slopes, cu_seqlens, *, use_state=True):
    """All three ops on one problem, the packed one on its first V = K columns."""
    results = check_attention(
        triton_lightning_attention, q, k, v, state, do, dfinal, slopes, cu_seqlens, use_state=use_state
    )
    check_attention_state(
        triton_lightning_attention_state, k, v, state, dfinal, slopes, cu_seqlens, use_state=use_state
    )
    B, T, H, K = k.shape
    packed = random_packed(T, K, B=B, H=H, device=DEVICE)
    square = (state[..., :K], do[..., :K], dfinal[..., :K])
    check_attention_packed(triton_lightning_attention_packed, *packed, *square, slopes, cu_seqlens, use_state=use_state)
    return results


def embedded(x):
    """``x`` as a view into a buffer of NaN, which lies before and behind every dim."""
    buffer = x.new_full([size + 2 for size in x.shape], float("nan"))
    view = buffer[tuple(slice(1, -1) for _ in x.shape)]
    view.copy_(x)
    return view


# Against the definition


@pytest.mark.parametrize("T", [0, 1, 31, 32, 33, 65])
def test_equals_the_definition_at_every_length(T):
    check_attention(triton_lightning_attention, *problem(T, 16, 16))
    check_attention(triton_lightning_attention, *problem(T, 16, 16, slopes=ALIBI[:1]), use_state=False)


@pytest.mark.parametrize(
    ("K", "V"), [(1, 1), (1, 16), (16, 1), (48, 80), (80, 48), (96, 96), (192, 128), (128, 192), (256, 32), (32, 256)]
)
def test_equals_the_definition_at_every_head_dim(K, V):
    check_attention(triton_lightning_attention, *problem(33, K, V, slopes=ALIBI[:1]))


@pytest.mark.parametrize(("chunk", "columns"), [(16, 16), (32, 64), (32, 16), (64, 32)])
def test_equals_the_definition_with_every_tile(chunk, columns, monkeypatch):
    forward = Tiles(chunk, columns, 4, 2)
    other = 48 - chunk if chunk < 64 else 16
    monkeypatch.setattr(attention_launch, "attention_tiles", lambda *args: forward)
    monkeypatch.setattr(
        attention_launch, "attention_bwd_tiles", lambda *args: BackwardTiles(chunk, columns, other, 32, 4, 2)
    )
    check_attention(triton_lightning_attention, *problem(97, 40, 24, slopes=ALIBI[:1]))


@pytest.mark.parametrize("num_heads", [8, 20, 32])
def test_equals_the_definition_with_the_decays_of_a_model(num_heads):
    # The steepest, a middle and the flattest head, in the first and the next to last of 16 layers.
    alibi = [2.0 ** (-8 * head / num_heads) for head in (1, num_heads // 2, num_heads)]
    slopes = [slope * (1 - layer / 15 + 1e-5) for slope, layer in zip((*alibi, alibi[0]), (0, 0, 14, 14), strict=True)]
    check_attention(triton_lightning_attention, *problem(65, slopes=slopes))


@pytest.mark.parametrize(
    ("documents", "use_state"),
    [(DOCUMENTS, True), (DOCUMENTS, False), ((0, 70), True), ((0, 0, 70, 70), False), ((0, 16, 64, 70), True)],
)
def test_documents_equal_the_definition(documents, use_state):
    check_attention(triton_lightning_attention, *problem(documents=documents, slopes=SLOPES[2:]), use_state=use_state)


def test_documents_without_a_token():
    for documents in ((0, 0), (0, 0, 0)):
        _, final, *_, dinitial = check_attention(triton_lightning_attention, *problem(0, documents=documents))
        *_, state, _, dfinal, _, _ = problem(0, documents=documents)
        assert torch.equal(final, state)
        assert torch.equal(dinitial, dfinal)


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2), (2, 5, 0)])
def test_takes_no_rows_and_no_heads(shape):
    B, T, H = shape
    q, k, v, state, do, dfinal, slopes, _ = problem(T, slopes=ALIBI[:H], B=B)
    check_attention(triton_lightning_attention, q, k, v, state, do, dfinal, slopes)
    check_attention_state(triton_lightning_attention_state, k, v, state, dfinal, slopes)
    if H:
        square = (state[..., :16], do[..., :16], dfinal[..., :16])
        packed = random_packed(T, 16, B=B, H=H, device=DEVICE)
        check_attention_packed(triton_lightning_attention_packed, *packed, *square, slopes)


@pytest.mark.parametrize(("documents", "use_state"), [(None, True), (None, False), (DOCUMENTS, True)])
def test_state_equals_the_definition(documents, use_state):
    _, k, v, state, _, dfinal, slopes, cu_seqlens = problem(slopes=SLOPES[2:], documents=documents)
    check_attention_state(
        triton_lightning_attention_state, k, v, state, dfinal, slopes, cu_seqlens, use_state=use_state
    )


@pytest.mark.parametrize(
    ("activation", "documents", "use_state"),
    [("silu", None, True), ("silu", DOCUMENTS, True), ("silu", None, False), (None, None, True)],
)
def test_packed_equals_the_definition(documents, use_state, activation):
    _, _, _, state, do, dfinal, slopes, cu_seqlens = problem(K=24, slopes=SLOPES[2:], documents=documents)
    packed = random_packed(70, 24, device=DEVICE)
    check_attention_packed(
        triton_lightning_attention_packed, *packed, state, do, dfinal, slopes, cu_seqlens,
        activation=activation, use_state=use_state,
    )  # fmt: skip


def test_fp16_is_rounded_once():
    # Compiled, its dots round what is decayed to tf32, which has the mantissa of fp16.
    check_attention(triton_lightning_attention, *problem(65, 48, 48, slopes=ALIBI, dtype=torch.float16), ratio=1e-3)


def test_large_fp16_values_do_not_overflow_on_the_way():
    # Scores and states pass 65504, the largest fp16 value; outputs do not.
    q, k, v, state, do, dfinal, slopes, _ = problem(65, 48, 48, slopes=(0.0, 0.5), dtype=torch.float16)
    q, k, v, do = q * 2**6, k * 2**6, v * 2**-6, do * 2**-8
    check_attention(triton_lightning_attention, q, k, v, state, do, dfinal * 2**-8, slopes, ratio=1e-3)


# Segments


@pytest.mark.parametrize(("documents", "count"), [(None, 2), (None, 3), (None, 9), (DOCUMENTS, 2), (DOCUMENTS, 9)])
def test_segments_equal_the_definition(count, documents, segmented):
    segmented(count)
    T = 8 * ROWS + 5
    documents = documents and (0, 1, T)
    check_attention(triton_lightning_attention, *problem(T, slopes=ALIBI[:1], documents=documents))


@pytest.mark.parametrize(("documents", "use_state"), [(None, False), (DOCUMENTS, True)], ids=["", "documents"])
def test_segments_of_every_op_equal_the_definition(documents, use_state, segmented):
    segmented(3)
    T = 2 * ROWS + 5
    documents = documents and (0, 2, T)
    check_every_op(*problem(T, 16, 16, slopes=ALIBI[:1], documents=documents), use_state=use_state)


@pytest.mark.parametrize(
    ("documents", "T"), [(None, 1), (None, ROWS + 1), (DOCUMENTS, 0), (DOCUMENTS, 1), (DOCUMENTS, ROWS + 1)]
)
def test_more_segments_than_rows(T, documents, segmented):
    segmented(9)
    check_attention(triton_lightning_attention, *problem(T, slopes=ALIBI[:1], documents=documents and (0, T)))


@packings
def test_segments_equal_one_pass(documents, segmented):
    T = 4 * ROWS + 7
    inputs = problem(T, slopes=(0.0,), documents=documents and (0, 2 * ROWS, T))
    results = []
    for count in (1, 4):
        segmented(count)
        results.append(check_attention(triton_lightning_attention, *inputs))
    for name, a, e in zip(("o", "final", "dq", "dk", "dv", "dinitial"), *results[::-1], strict=True):
        assert_close(name, a, e)


def test_segments_leave_out_what_has_decayed(segmented):
    # The walks that make only states skip rows whose share of the state is below 2^-150: at these slopes all but 5.
    segmented(3)
    check_every_op(*problem(4 * ROWS + 3, 16, 16, slopes=(20.0,)))


# What callers rely on


def test_whole_equals_pieces_forward_and_backward():
    q, k, v, state, do, dfinal, slopes, _ = problem(100, 16, 16, slopes=ALIBI[:1])

    def whole(q, k, v, state):
        return triton_lightning_attention(q, k, v, slopes, initial_state=state, output_final_state=True)

    def pieces(q, k, v, state):
        outputs = []
        for x in zip(*(x.split([1, 34, 32, 33], 1) for x in (q, k, v)), strict=True):
            o, state = triton_lightning_attention(*x, slopes, initial_state=state, output_final_state=True)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    results = (with_gradients(op, (q, k, v, state), (do, dfinal)) for op in (pieces, whole))
    names = ("o", "final", "dq", "dk", "dv", "dinitial")
    for name, a, e in zip(names, *(sum(result, ()) for result in results), strict=True):
        assert_close(name, a, e)


@pytest.mark.parametrize(("documents", "count"), [(None, 1), (None, 3), (DOCUMENTS, 3)])
def test_nan_around_the_inputs_is_not_read(documents, count, segmented):
    segmented(count)
    T = 2 * ROWS + 9
    inputs = problem(T, 20, 24, slopes=ALIBI[:1], B=1 if documents else 2, documents=documents and (0, 5, T))
    *tensors, slopes, cu_seqlens = inputs
    tensors = [embedded(x) for x in tensors]
    check_attention(triton_lightning_attention, *tensors, embedded(slopes), cu_seqlens)
    _, k, v, state, do, dfinal = tensors
    check_attention_state(triton_lightning_attention_state, k, v, state, dfinal, embedded(slopes), cu_seqlens)
    qkvu, du = random_packed(T, 20, B=len(k), H=1, device=DEVICE)
    square = (state[..., :20], do[..., :20], dfinal[..., :20])
    check_attention_packed(
        triton_lightning_attention_packed, embedded(qkvu), embedded(du), *square, embedded(slopes), cu_seqlens
    )


def test_nan_in_a_document_stays_there():
    q, k, v, state, do, _, slopes, cu_seqlens = problem(slopes=ALIBI, documents=(0, 20, 40, 70))
    broken = slice(20, 40)
    for x in (q, k, v):
        x[:, broken] = float("nan")

    def op(q, k, v, state):
        return triton_lightning_attention(q, k, v, slopes, initial_state=state, cu_seqlens=cu_seqlens)[0]

    o, (dq, dk, dv, _) = with_gradients(op, (q, k, v, state), do)
    for x in (o, dq, dk, dv):
        assert x[:, broken].isnan().any()
        assert x[:, :20].isfinite().all()
        assert x[:, 40:].isfinite().all()


@pytest.mark.parametrize("count", [1, 3])
def test_runs_are_bitwise_equal(count, segmented):
    segmented(count)
    T = 3 * ROWS + 1
    first, second = (
        check_attention(triton_lightning_attention, *problem(T, slopes=ALIBI[:1], documents=(0, 40, T)))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_takes_views_of_any_strides():
    q, k, v, state, do, dfinal, _, _ = problem(17, 16, 16, slopes=ALIBI, B=2)
    packed = random_packed(17, 16, B=2, device=DEVICE)[0].unflatten(-1, (4, 2, 16)).unbind(2)
    views = {
        "packed": packed[:3],
        "heads first": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        "dims first": [x.mT.contiguous().mT for x in (q, k, v)],
        "flipped and expanded": [q.flip(-1), k, v[:, :, :1].expand(-1, -1, 2, -1)],
        "every second": [x.repeat_interleave(2, 1).repeat_interleave(2, 3)[:, ::2, :, ::2] for x in (q, k, v)],
        "one row": [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)],
    }
    state, dfinal = state.mT.contiguous().mT, dfinal.transpose(0, 1).contiguous().transpose(0, 1)
    for view in views.values():
        check_attention(triton_lightning_attention, *view, state, do.mT.contiguous().mT, dfinal, decays(*ALIBI))


def test_takes_slopes_and_cu_seqlens_of_any_strides():
    *inputs, _, cu_seqlens = problem(20, slopes=ALIBI, documents=(0, 5, 5, 20))
    slopes = decays(*ALIBI).repeat_interleave(2)[::2]
    cu_seqlens = cu_seqlens.repeat_interleave(2)[::2]
    assert not slopes.is_contiguous()
    check_every_op(*inputs, slopes, cu_seqlens)
    check_attention(triton_lightning_attention, *inputs, decays(ALIBI[0]).expand(2), cu_seqlens)


def test_takes_slopes_in_fp64():
    inputs = problem(20, slopes=ALIBI)
    check_every_op(*inputs[:6], inputs[6].double(), None)


def test_takes_a_packed_projection_of_any_strides():
    _, _, _, state, do, dfinal, slopes, _ = problem(20, V=16, slopes=ALIBI, B=2)
    qkvu, du = random_packed(20, 16, B=2, device=DEVICE)
    cases = [
        (qkvu.transpose(0, 1).contiguous().transpose(0, 1), du),
        (qkvu[:1].expand(2, -1, -1), du[:, :1].expand(-1, 20, -1)),
        (qkvu.mT.contiguous().mT, du.mT.contiguous().mT),
    ]
    for view, gradient in cases:
        check_attention_packed(triton_lightning_attention_packed, view, gradient, state, do, dfinal, slopes)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 20, 1, 24), (1, 1, 2, 24), (1, 20, 2, 1)])
def test_takes_expanded_gradients(sizes):
    q, k, v, state, do, dfinal, slopes, _ = problem(20, slopes=ALIBI)
    do = do[tuple(slice(size) for size in sizes)].expand(do.shape)
    check_attention(triton_lightning_attention, q, k, v, state, do, dfinal[..., :1].expand(dfinal.shape), slopes)


def test_inputs_are_left_as_they_were(segmented):
    segmented(2)
    inputs = problem(2 * ROWS, slopes=ALIBI[:1])[:7]
    before = [x.clone() for x in inputs]
    check_every_op(*inputs, None)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("i_output", [0, 1])
def test_gradients_of_one_output_alone(i_output):
    q, k, v, state, do, dfinal, slopes, _ = problem(slopes=ALIBI)
    doutput = (do, dfinal)[i_output]

    def of(op, slopes):
        return lambda *x: op(*x[:3], slopes, initial_state=x[3], output_final_state=True)[i_output]

    _, actual = with_gradients(of(triton_lightning_attention, slopes), (q, k, v, state), doutput)
    wide = [x.double() for x in (q, k, v, state)]
    _, expected = with_gradients(of(naive_lightning_attention, slopes.double()), wide, doutput.double())
    for name, a, e in zip(("dq", "dk", "dv", "dinitial"), actual, expected, strict=True):
        assert_close(name, a, e)


def test_packed_gradients_of_one_output_alone():
    qkvu, du = random_packed(20, 16, device=DEVICE)
    _, _, _, state, do, dfinal, slopes, _ = problem(20, V=16, slopes=ALIBI)
    doutputs = (do, du, dfinal)

    def run(qkvu, state):
        return triton_lightning_attention_packed(
            qkvu, slopes, num_heads=2, initial_state=state, output_final_state=True
        )

    _, whole = with_gradients(run, (qkvu, state), doutputs)
    alone = [with_gradients(lambda *x, i=i: run(*x)[i], (qkvu, state), doutputs[i])[1] for i in range(3)]
    assert_close("dqkvu", sum(dqkvu for dqkvu, _ in alone), whole[0].double())
    assert_close("dinitial", sum(dinitial for _, dinitial in alone), whole[1].double())
    assert torch.equal(alone[1][0], torch.cat((torch.zeros_like(qkvu[..., :96]), du), -1))
    assert torch.equal(alone[0][0][..., 96:], torch.zeros_like(du))


def test_packed_op_keeps_u_as_a_view():
    qkvu = random_packed(5, 16, device=DEVICE)[0]
    for leaf in (qkvu, qkvu.requires_grad_()):
        _, u, final = triton_lightning_attention_packed(leaf, decays(*ALIBI), num_heads=2)
        assert final is None
        assert u.untyped_storage().data_ptr() == qkvu.untyped_storage().data_ptr()


def test_only_some_inputs_need_gradients():
    q, k, v, state, do, _, slopes, _ = problem(20, slopes=ALIBI)
    names = ("q", "k", "v", "initial_state")
    tensors = dict(zip(names, (q, k, v, state), strict=True))
    every = [x.clone().requires_grad_() for x in tensors.values()]
    o, _ = triton_lightning_attention(*every[:3], slopes, initial_state=every[3])
    expected = dict(zip(names, torch.autograd.grad(o, every, do), strict=True))
    for name in names:
        leaf = tensors[name].clone().requires_grad_()
        used = tensors | {name: leaf}
        o, _ = triton_lightning_attention(used["q"], used["k"], used["v"], slopes, initial_state=used["initial_state"])
        assert torch.equal(torch.autograd.grad(o, leaf, do)[0], expected[name])


@pytest.mark.parametrize("num_documents", [1, 2, 64, 65, 130])
def test_the_longest_documents_come_first(num_documents):
    lengths = torch.randint(0, 9, (num_documents,), generator=torch.Generator().manual_seed(0))
    cu_seqlens = int32(0, *lengths.cumsum(0).tolist())
    x = torch.empty(1, int(lengths.sum()), 1, 1, device=DEVICE)
    expected = lengths.argsort(descending=True, stable=True).to(DEVICE, torch.int32)
    for offsets in (cu_seqlens, cu_seqlens.repeat_interleave(2)[::2]):
        assert torch.equal(attention_launch.sequences(x, offsets).order, expected)


@pytest.mark.parametrize("offsets", [(-5, 70), (0, 500), (30, 10, 70), (0, 2**30, 70)])
def test_wrong_offsets_stay_within_the_tensors(offsets):
    # The public op looks at offsets in host memory; those on a GPU come here as they are.
    q, k, v, *_ = random_inputs(70, 16, 16)
    values = [x.to(DEVICE) for x in (q, k, v)]
    o, _ = triton_lightning_attention(*values, torch.zeros(2, device=DEVICE), cu_seqlens=int32(*offsets))
    assert o.shape == v.shape


# The public ops


def test_public_ops_take_these_forms_for_fp32_and_the_torch_forms_for_fp64(monkeypatch):
    monkeypatch.setitem(FORM_OF_DEVICE, DEVICE, "triton")
    q, k, v, state, do, dfinal, slopes, _ = problem(20, V=16, slopes=ALIBI)
    qkvu, du = random_packed(20, 16, device=DEVICE)
    calls = []

    def record(kind):
        launch = getattr(attention_launch, kind)
        return lambda *args: (calls.append(kind), launch(*args))

    for module, kind in (("attention", "forward"), ("attention", "state_forward"), ("packed", "forward")):
        monkeypatch.setattr(f"tnl_kernels.{module}_triton.{kind}", record(kind))
    for dtype, expected in ((torch.float32, ["forward", "state_forward", "forward"]), (torch.float64, [])):
        tensors = [x.to(dtype) for x in (q, k, v, state, do, dfinal)]
        q, k, v, state, do, dfinal = tensors
        check_attention(lightning_attention, *tensors, slopes)
        check_attention_state(lightning_attention_state, k, v, state, dfinal, slopes)
        packed = [x.to(dtype) for x in (qkvu, du)]
        check_attention_packed(lightning_attention_packed, *packed, state, do, dfinal, slopes)
        assert calls == expected
        calls.clear()
