"""What only a GPU shows of attention: half precision, long sequences, compiled variants, Inductor, CUDA graphs."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import triton
from tnl_kernels import (
    attention_kernels,
    attention_launch,
    attention_triton,
    lightning_attention,
    lightning_attention_packed,
    lightning_attention_state,
    segments,
    tiles,
)

from tests.attention_inputs import ALIBI, check_attention, int32, random_inputs, random_packed, with_gradients

# Scripts that import each other by name, as they do when they are run.
sys.path.append(str(Path(__file__).parent.parent / "kernels" / "benchmarks"))
cases, correctness, reference = map(importlib.import_module, ("cases", "correctness", "reference"))

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = ("attention_fwd_kernel", "attention_bwd_kernel", "states_kernel", "combine_kernel", "order_kernel")
half = pytest.mark.parametrize("dtype", [BF16, FP16])
every_dtype = pytest.mark.parametrize("dtype", [BF16, FP16, FP32])


def gate(case):
    """The gate of the benchmarks on one more case: errors, NaN around inputs and in fresh memory, bits of two runs."""
    row = correctness.check(case, "cuda")
    assert row["ok"], correctness.describe(row)


def inputs_of(T, K, V, *, B=1, H=2, N=None, dtype=BF16, seed=0):
    """q, k, v, state, do, dfinal on the GPU."""
    return random_inputs(T, K, V, B=B, H=H, N=N, dtype=dtype, seed=seed, device="cuda")


def slopes_of(*values):
    return torch.tensor(values, device="cuda")


# The gates of the issue at shapes that the benchmarks do not have


HEAD_DIMS = [(16, 16), (32, 32), (128, 32), (32, 128), (112, 72), (8, 24), (256, 256)]


@pytest.mark.parametrize(
    ("K", "V", "dtype"),
    [*((*dims, dtype) for dtype in (BF16, FP32) for dims in HEAD_DIMS), (16, 16, FP16), (128, 32, FP16)],
)
def test_every_head_dim_is_within_the_bounds(K, V, dtype):
    gate(cases.short(T=301, K=K, V=V, dtype=dtype, state=True, embedded=True))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("num_heads", [8, 20, 32])
def test_the_decays_of_a_model_are_within_the_bounds(num_heads, dtype):
    alibi = [2.0 ** (-8 * head / num_heads) for head in (1, num_heads // 2, num_heads)]
    slopes = tuple(slope * (1 - layer / 15 + 1e-5) for layer in (0, 7, 14) for slope in alibi)
    gate(cases.short(T=1100, dtype=dtype, state=True, slopes=slopes))


@half
@pytest.mark.parametrize("K", [32, 48, 64])
def test_the_packed_op_is_within_the_bounds(K, dtype):
    gate(cases.short(T=301, K=K, V=K, dtype=dtype, op="packed", state=True))
    gate(cases.short(T=777, K=K, V=K, dtype=dtype, op="packed", state=True, documents=cases.DOCUMENTS))


@half
@pytest.mark.parametrize(("K", "V"), [(128, 32), (64, 64)])
def test_the_state_op_is_within_the_bounds(K, V, dtype):
    gate(cases.short(T=301, K=K, V=V, dtype=dtype, op="state", state=True, embedded=True))


@every_dtype
@pytest.mark.parametrize(("K", "V", "op"), [(32, 32, "plain"), (128, 128, "plain"), (128, 128, "packed")])
def test_long_sequences_are_within_the_bounds(K, V, op, dtype):
    case = cases.Case(name=f"T 20000 {op}", T=20000, K=K, V=V, dtype=dtype, op=op, state=True, slopes=(0.0, 1e-4, 0.1))
    properties = tiles.properties(torch.device("cuda", torch.cuda.current_device()))
    assert segments.num_segments(20000, 3, 1, K, V, properties[2], 1) > 1, "a case for segments that has one"
    gate(case)
    gate(replace(case, name=f"{case.name} documents", documents=(0, 15000, 15001, 15001, 20000)))


@every_dtype
@pytest.mark.parametrize("count", [2, 8, 64])
def test_segments_equal_one_pass(count, dtype, monkeypatch):
    q, k, v, state, do, dfinal = inputs_of(5001, 64, 48, dtype=dtype)
    results = []
    for forced in (1, count):
        monkeypatch.setattr(attention_launch, "num_segments", lambda *args, forced=forced: forced)
        outputs, gradients = with_gradients(
            lambda *x: lightning_attention(*x[:3], slopes_of(1e-4, 0.3), initial_state=x[3], output_final_state=True),
            (q, k, v, state),
            (do, dfinal),
        )
        results.append((*outputs, *gradients))
    for name, i_h, a, e in zip(("o", "final", "dq", "dk", "dv", "dinitial"), (2, 1, 2, 2, 2, 1), *results, strict=True):
        bounds = correctness.STATE_BOUNDS if i_h == 1 else correctness.BOUNDS
        error = reference.relative_error(a, e, i_h)
        # Each is within its bound of the truth, and so within two of each other.
        assert error <= 2 * bounds[dtype], f"{name} of {count} segments is {error:.1e} from that of one pass"


# Miscompilation


@pytest.mark.parametrize(
    ("op", "K", "V"),
    [
        *(("plain", *dims) for dims in ((128, 128), (128, 32), (32, 128), (64, 64), (32, 32), (256, 128), (16, 16))),
        *(("packed", dim, dim) for dim in (128, 64, 32, 16)),
    ],
)
def test_transposed_results_of_dots_are_compiled_right(op, K, V):
    """Triton 3.4 to 3.7 on Hopper gives wrong numbers for tl.dot(tl.trans(<result of a dot>), x).

    A wrong chunk shows only where a state meets it, so several chunks; which tiles are hit depends on the layouts that
    the compiler chooses, so many head dims.
    """
    case = cases.short(T=200, K=K, V=V, op=op, slopes=(0.01, 0.1), state=True)
    row = correctness.check(case, "cuda")
    assert row["ok"], (
        f"{correctness.describe(row)}: if only some of these are far off, Triton {triton.__version__} may miscompile "
        "tl.dot(tl.trans(<result of a dot>), x), as 3.4 to 3.7 do on Hopper. Do not train with it. Look at what "
        "scan_triton.chunk transposes (the result of a dot may be transposed only to be stored), then at the tiles in "
        "tiles.py: another number of columns or warps changes the layouts"
    )


@pytest.mark.parametrize("columns", [16, 32, 64, 128])
@pytest.mark.parametrize("num_warps", [4, 8])
def test_every_tile_of_the_table_and_others_are_compiled_right(columns, num_warps, monkeypatch):
    chosen = tiles.Tiles(32, columns, num_warps, 3)
    backward = tiles.BackwardTiles(32, columns, 32, columns, num_warps, 3)
    monkeypatch.setattr(attention_launch, "attention_tiles", lambda *args: chosen)
    monkeypatch.setattr(attention_launch, "state_tiles", lambda *args: chosen)
    monkeypatch.setattr(attention_launch, "attention_bwd_tiles", lambda *args: backward)
    gate(cases.short(T=200, K=128, V=128, slopes=(0.01, 0.1), state=True))


# Compiled variants


def variants():
    """How many compiled variants each kernel has on this device."""
    device = torch.cuda.current_device()
    return {name: len(getattr(attention_kernels, name).device_caches[device][0]) for name in KERNELS}


def run_every_op(T, *, B=1, H=2, documents=None, K=80, dtype=BF16):
    """Forward and backward of the three ops, with all that they take and give."""
    N = B if documents is None else len(documents) - 1
    cu_seqlens = None if documents is None else int32(*documents, device="cuda")
    slopes = slopes_of(*(0.01 * (i_h + 1) for i_h in range(H)))
    q, k, v, state, do, dfinal = inputs_of(T, K, K, B=B, H=H, N=N, dtype=dtype)
    qkvu, du = random_packed(T, K, B=B, H=H, dtype=dtype, device="cuda")
    given = {"cu_seqlens": cu_seqlens}
    both = {"output_final_state": True, **given}

    def plain(q, k, v, state):
        return lightning_attention(q, k, v, slopes, initial_state=state, **both)

    def state_only(k, v, state):
        return lightning_attention_state(k, v, slopes, initial_state=state, **given)

    def packed(qkvu, state):
        return lightning_attention_packed(qkvu, slopes, num_heads=H, initial_state=state, **both)

    return (
        with_gradients(plain, (q, k, v, state), (do, dfinal)),
        with_gradients(state_only, (k, v, state), dfinal),
        with_gradients(packed, (qkvu, state), (do, du, dfinal)),
    )


def documents_of(num_documents, T):
    """Offsets of documents of nearly one length."""
    return tuple(T * n // num_documents for n in range(num_documents + 1))


@pytest.mark.parametrize("count", [1, 4])
def test_lengths_batches_and_heads_compile_nothing_new(count, monkeypatch):
    monkeypatch.setattr(attention_launch, "num_segments", lambda *args: count)
    run_every_op(300)
    before = variants()
    for T, B, H in ((1, 1, 1), (17, 1, 2), (16, 3, 16), (777, 2, 1), (1024, 1, 5), (4096, 1, 1)):
        run_every_op(T, B=B, H=H)
    assert variants() == before


@pytest.mark.parametrize("count", [1, 4])
def test_documents_compile_nothing_new(count, monkeypatch):
    monkeypatch.setattr(attention_launch, "num_segments", lambda *args: count)
    run_every_op(300, documents=documents_of(3, 300))
    before = variants()
    for num_documents, T in ((1, 300), (2, 300), (16, 777), (17, 17), (64, 640), (100, 50), (9000, 9000)):
        run_every_op(T, documents=documents_of(num_documents, T))
    assert variants() == before


def test_the_number_of_segments_compiles_nothing_new(monkeypatch):
    counts = []
    for count in (2, 3, 16, 64):
        monkeypatch.setattr(attention_launch, "num_segments", lambda *args, count=count: count)
        run_every_op(3000)
        counts.append(variants())
    assert counts == counts[:1] * len(counts)


# What callers rely on


@every_dtype
@pytest.mark.parametrize("documents", [None, (0, 3, 3, 900, 20000)], ids=["", "documents"])
def test_runs_are_bitwise_equal(documents, dtype):
    def flat():
        (o, gradients), (state, of_state), (packed, of_packed) = run_every_op(
            20000, H=3, documents=documents, dtype=dtype
        )
        return [*o, *gradients, state, *of_state, *packed, *of_packed]

    first = flat()
    noise = torch.randn(2**26, device="cuda")
    for _ in range(3):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(20):
                noise = noise * 1.0001  # another kernel on the same multiprocessors changes who comes first
        assert all(torch.equal(a, b) for a, b in zip(first, flat(), strict=True))
        torch.cuda.synchronize()


def test_another_stream_may_be_current():
    q, k, v, state, _, _ = inputs_of(100, 32, 32)
    expected, _ = lightning_attention(q, k, v, slopes_of(*ALIBI), initial_state=state)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    slopes = slopes_of(*ALIBI)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        o, _ = lightning_attention(q, k, v, slopes, initial_state=state)
    stream.synchronize()
    assert torch.equal(o, expected)


def test_fp32_is_not_rounded_to_tf32():
    inputs = inputs_of(300, 64, 64, dtype=FP32)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        check_attention(lightning_attention, *inputs, slopes_of(*ALIBI))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_autocast_does_not_change_the_precision():
    q, k, v, state, _, _ = inputs_of(100, 32, 32, dtype=FP32)
    slopes = slopes_of(*ALIBI)
    expected, _ = lightning_attention(q, k, v, slopes, initial_state=state)
    with torch.autocast("cuda", dtype=BF16):
        o, _ = lightning_attention(q, k, v, slopes, initial_state=state)
    assert torch.equal(o, expected)


# Inductor and CUDA graphs


def rms_norm(x):
    """With one eps: torch's own differs by dtype."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)


def block(x, weight, out, slopes):
    """What a layer of the model does around the packed op."""
    qkvu = rms_norm(x) @ weight
    o, u, _ = lightning_attention_packed(qkvu, slopes, num_heads=len(slopes))
    o = o.flatten(2)  # [B, T, D]
    return x + (u * rms_norm(o)) @ out


def block_inputs(T=200, B=2, D=128):
    """x, the two weights and the slopes of a block of two heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, D), (D, 4 * D), (D, D))
    x, weight, out = (torch.randn(*shape, generator=generator).to("cuda", BF16) for shape in shapes)
    return x, weight / D**0.5, out / D**0.5, slopes_of(*ALIBI)


def test_a_block_compiles_to_one_graph():
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, fullgraph=True, backend=count)
    *tensors, slopes = block_inputs()
    wide = [x.double() for x in tensors]
    dout = torch.ones_like(tensors[0])
    results = []
    for op, given in ((compiled, tensors), (block, tensors), (block, wide)):
        of = slopes.double() if given is wide else slopes
        y, gradients = with_gradients(lambda *x, op=op, of=of: op(*x, of), given, dout.to(given[0].dtype))
        results.append((y, *gradients))
    assert count.frame_count == 1
    for name, actual, eager, exact in zip(("y", "dx", "dweight", "dout"), *results, strict=True):
        errors = [reference.relative_error(x[None], exact[None], 0) for x in (actual, eager)]
        # Inductor keeps what it fuses in fp32, so it may only be nearer.
        assert errors[0] <= 1.2 * errors[1] + 1e-3, f"{name}: compiled {errors[0]:.1e}, eager {errors[1]:.1e}"


def test_inductor_gives_views_as_they_lie(monkeypatch):
    """A contiguous copy of q, k or v would cost as much as the op."""
    torch._dynamo.reset()
    seen = []

    def record(name):
        launch = getattr(attention_triton, name)
        return lambda *args: (seen.extend(x.stride() for x in args[:3]), launch(*args))

    for name in ("forward", "backward"):
        monkeypatch.setattr(attention_triton, name, record(name))
    x, weight, _, slopes = block_inputs()

    def attend(x, weight):
        q, k, v, u = (x @ weight).unflatten(-1, (4, 2, 64)).unbind(2)
        return lightning_attention(q, k, v, slopes)[0] * u

    dout = torch.ones(2, 200, 2, 64, device="cuda", dtype=BF16)
    with_gradients(torch.compile(attend, fullgraph=True), (x, weight), dout)
    assert seen == [(200 * 512, 512, 64, 1)] * 6


@half
@pytest.mark.parametrize("documents", [None, (0, 7, 7, 500, 3000)], ids=["", "documents"])
@pytest.mark.parametrize("count", [1, 4])
def test_forward_runs_in_a_cuda_graph(count, documents, dtype, monkeypatch):
    monkeypatch.setattr(attention_launch, "num_segments", lambda *args: count)
    N = 1 if documents is None else len(documents) - 1
    first = inputs_of(3000, 64, 64, N=N, dtype=dtype)[:4]
    second = inputs_of(3000, 64, 64, N=N, dtype=dtype, seed=1)[:4]
    slopes = slopes_of(*ALIBI)
    cu_seqlens = None if documents is None else int32(*documents, device="cuda")

    def run(q, k, v, state):
        return lightning_attention(q, k, v, slopes, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)

    expected = [[x.clone() for x in run(*inputs)] for inputs in (first, second)]
    static = [x.clone() for x in first]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(*static)
    for inputs, wanted in zip((first, second), expected, strict=True):
        for x, value in zip(static, inputs, strict=True):
            x.copy_(value)
        graph.replay()
        assert all(torch.equal(a, e) for a, e in zip(outputs, wanted, strict=True))


def test_forward_and_backward_run_in_a_cuda_graph():
    qkvu, du = random_packed(500, 64, dtype=BF16, device="cuda")
    slopes = slopes_of(*ALIBI)
    do = inputs_of(500, 64, 64)[4]
    leaf = qkvu.clone().requires_grad_()

    def run():
        o, u, _ = lightning_attention_packed(leaf, slopes, num_heads=2)
        return torch.autograd.grad((o, u), leaf, (do, du))[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run().clone()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = run()
    gradient.zero_()
    graph.replay()
    assert torch.equal(gradient, expected)


def test_the_sequence_is_not_read_by_the_host(monkeypatch):
    """A look at cu_seqlens or the slopes would make the host wait for the device at every call."""
    q, k, v, state, do, dfinal = inputs_of(300, 64, 64, N=3)
    cu_seqlens, slopes = int32(0, 5, 100, 300, device="cuda"), slopes_of(*ALIBI)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(
            lambda *x: lightning_attention(
                *x[:3], slopes, initial_state=x[3], output_final_state=True, cu_seqlens=cu_seqlens
            ),
            (q, k, v, state),
            (do, dfinal),
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
