"""The Triton norms, gate and LRPE against their definitions in fp64: in the interpreter on CPU, compiled on a GPU."""

import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from tnl_kernels import norm_triton, rows
from tnl_kernels.glu_triton import triton_sglu
from tnl_kernels.lrpe_triton import triton_lrpe
from tnl_kernels.naive import (
    naive_add_srmsnorm,
    naive_fork_srmsnorm,
    naive_gated_srmsnorm,
    naive_lrpe,
    naive_sglu,
    naive_srmsnorm,
)
from tnl_kernels.norm_triton import triton_add_srmsnorm, triton_fork_srmsnorm, triton_gated_srmsnorm, triton_srmsnorm
from torch import library

from tests.closeness import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes in numpy, which has no bf16: its roundings there are not those of a GPU.
DTYPES = [
    torch.float32,
    *(pytest.param(dtype, marks=pytest.mark.gpu) for dtype in (torch.bfloat16, torch.float16)),
]
# 50 digits: the product with a position of 10 digits keeps more than fp64 holds.
PI = Fraction(314159265358979323846264338327950288419716939937510, 10**50)


@pytest.fixture(autouse=True)
def _poison():
    """Every torch.empty is filled with NaN, so what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def theta_of(H, K):
    return (10000 ** (-2 * torch.arange(H * K, dtype=torch.float64) / (H * K))).float().view(H, 1, K).to(DEVICE)


def last_quarter(*shape, dtype=torch.float32, seed=0):
    """A view of a packed tensor, as the model's projection gives it."""
    return normal(*shape[:-1], 4 * shape[-1], dtype=dtype, seed=seed)[..., -shape[-1] :]


def check(op, definition, inputs, dout=None, ratio=None):
    """Outputs and gradients of ``op(*inputs)`` against ``definition`` in fp64; a dout of None is an unused output."""
    results = []
    for form, wide in ((op, False), (definition, True)):
        leaves = [x.detach().double() if wide else x.detach() for x in inputs]
        leaves = [x.requires_grad_() for x in leaves]
        outputs = form(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        used = [(out, g) for out, g in zip(outputs, dout, strict=True) if g is not None]
        gradients = [g.double() if wide else g for _, g in used]
        results.append((*outputs, *torch.autograd.grad([out for out, _ in used], leaves, gradients)))
    for i, (a, e) in enumerate(zip(*results, strict=True)):
        assert_close(f"output {i}" if i < len(dout) else f"gradient {i - len(dout)}", a, e, ratio)
    for a, x in zip(results[0][len(dout) :], inputs, strict=True):
        assert a.dtype == x.dtype


NORMS = pytest.mark.parametrize(
    ("op", "definition", "num_inputs"),
    [
        (triton_srmsnorm, naive_srmsnorm, 1),
        (triton_gated_srmsnorm, naive_gated_srmsnorm, 2),
        (triton_sglu, naive_sglu, 2),
    ],
    ids=["srmsnorm", "gated_srmsnorm", "sglu"],
)


@NORMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 7, 96), (3, 3), (1, 1000), (37, 130), (3, 5000), (64,), (2, 16384)])
def test_equals_the_definition(op, definition, num_inputs, dtype, shape):
    inputs = [normal(*shape, dtype=dtype, seed=i) for i in range(num_inputs)]
    check(op, definition, inputs, [normal(*shape, dtype=dtype, seed=9)])


@NORMS
def test_takes_rows_of_one_element(op, definition, num_inputs):
    inputs = [normal(5, 1, seed=i) for i in range(num_inputs)]
    # With the usual eps the gradient of such a norm is what is left of 1 - 1.
    eps = {} if op is triton_sglu else {"eps": 0.5}
    check(partial(op, **eps), partial(definition, **eps), inputs, [normal(5, 1, seed=9)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("unused", [None, "y", "residual"])
@pytest.mark.parametrize("D", [96, 333])
def test_add_srmsnorm_equals_the_definition(dtype, wide, unused, D):
    x, residual = normal(2, 7, D, dtype=dtype), normal(2, 7, D, dtype=torch.float32 if wide else dtype, seed=1)
    dout = [normal(2, 7, D, dtype=dtype, seed=2), normal(2, 7, D, dtype=residual.dtype, seed=3)]
    if unused:
        dout[["y", "residual"].index(unused)] = None
    check(triton_add_srmsnorm, naive_add_srmsnorm, [x, residual], dout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unused", [None, "y", "x"])
def test_fork_srmsnorm_equals_the_definition(dtype, unused):
    dout = [normal(2, 7, 96, dtype=dtype, seed=i) for i in (1, 2)]
    if unused:
        dout[["y", "x"].index(unused)] = None
    check(triton_fork_srmsnorm, naive_fork_srmsnorm, [normal(2, 7, 96, dtype=dtype)], dout)


def test_add_srmsnorm_casts_the_gradient_to_each_dtype():
    x, residual = normal(2, 7, 96, dtype=torch.float16).requires_grad_(), normal(2, 7, 96, seed=1).requires_grad_()
    y, total = triton_add_srmsnorm(x, residual)
    assert (y.dtype, total.dtype) == (torch.float16, torch.float32)
    dx, dresidual = torch.autograd.grad((y, total), (x, residual), (y.detach(), total.detach()))
    assert torch.equal(dx, dresidual.half())
    assert dresidual.dtype == torch.float32


def test_add_srmsnorm_gives_one_gradient_to_both():
    x, residual = normal(2, 7, 96).requires_grad_(), normal(2, 7, 96, seed=1).requires_grad_()
    y, _ = triton_add_srmsnorm(x, residual)
    dx, dresidual = torch.autograd.grad(y, (x, residual), torch.ones_like(y))
    assert dx.data_ptr() == dresidual.data_ptr()


@NORMS
def test_takes_strided_views(op, definition, num_inputs, monkeypatch):
    packed = [last_quarter(2, 7, 96, seed=i) for i in range(num_inputs)]
    seen = []
    monkeypatch.setattr(norm_triton, "as_rows", lambda x: seen.append((x, rows.as_rows(x))) or seen[-1][1])
    check(op, definition, packed, [last_quarter(2, 7, 96, seed=9)])
    assert all(before.data_ptr() == after.data_ptr() for before, after in seen)
    assert all(after.stride(0) == 4 * 96 for before, after in seen if before.stride(-2) == 4 * 96)


@NORMS
def test_takes_any_strides(op, definition, num_inputs):
    inputs = [normal(7, 96, 5, seed=i).transpose(1, 2) for i in range(num_inputs)]
    check(op, definition, inputs, [normal(5, 7, 96, seed=9).transpose(0, 1)])


@NORMS
def test_takes_expanded_gradients(op, definition, num_inputs):
    inputs = [normal(4, 5, 96, seed=i) for i in range(num_inputs)]
    for dout in (normal(96), normal(5, 96), normal(4, 1, 96), normal(1, 5, 1), torch.tensor(2.0, device=DEVICE)):
        check(op, definition, inputs, [dout.expand(4, 5, 96)])


@NORMS
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
def test_takes_no_rows(op, definition, num_inputs, shape):
    check(op, definition, [normal(*shape) for _ in range(num_inputs)], [normal(*shape)])


def test_norms_of_a_zero_row_are_zero_with_finite_gradients():
    x = torch.zeros(3, 8, device=DEVICE, requires_grad=True)
    y = triton_srmsnorm(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros_like(x))
    assert_close("dx", dx, torch.full((3, 8), 1e3, dtype=torch.float64, device=DEVICE))


def test_too_long_rows_are_refused():
    with pytest.raises(ValueError, match=r"last dimension: got 32769, .* at most 32768"):
        triton_srmsnorm(normal(1, 32769))


@pytest.mark.parametrize(("D", "width"), [(5632, 512), (1000, 1024), (33, 64), (1, 1), (2048, 2048), (11264, 1024)])
def test_columns_are_cut_with_little_padding(D, width):
    assert rows.column_tile(D) == width


# LRPE


def check_lrpe(x, theta, positions, dout, ratio=None):
    check(lambda x, theta: triton_lrpe(x, theta, positions), lambda x, theta: naive_lrpe(x, theta, positions),
          [x, theta], [dout], ratio)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [-20, 2**14, 10**6])
@pytest.mark.parametrize(("H", "K"), [(2, 16), (3, 24), (1, 7), (2, 128)])
def test_lrpe_equals_the_definition_at_any_position(dtype, first, H, K):
    x, dout = normal(2, 50, H, K, dtype=dtype), normal(2, 50, H, 2 * K, dtype=dtype, seed=1)
    check_lrpe(x, theta_of(H, K), torch.arange(first, first + 50, device=DEVICE), dout)


def test_lrpe_takes_positions_of_each_row_and_strided_views():
    x = last_quarter(2, 50, 32).unflatten(-1, (2, 16))
    positions = torch.stack((torch.arange(50), torch.arange(7, 57))).to(DEVICE)
    check_lrpe(x, theta_of(2, 16), positions, normal(50, 2, 2, 32, seed=1).transpose(0, 1))
    check_lrpe(x, theta_of(2, 16), positions[0], normal(32, seed=1).expand(2, 50, 2, 32))
    check_lrpe(x.transpose(2, 3), theta_of(16, 2), positions[0, :1].expand(50), normal(2, 50, 16, 4, seed=1))


def test_lrpe_sums_the_gradient_of_theta_over_programs():
    x, theta = normal(2, 300, 1, 128), theta_of(1, 128)
    positions = torch.arange(300, device=DEVICE)
    check_lrpe(x, theta, positions, normal(2, 300, 1, 256, seed=1))
    gradients = []
    for _ in range(2):
        leaf = theta.clone().requires_grad_()
        gradients += torch.autograd.grad(triton_lrpe(x, leaf, positions).square().sum() + leaf.sum(), leaf)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("needed", [0, 1])
def test_lrpe_gives_one_gradient_alone(needed):
    leaves = [normal(2, 5, 2, 16), theta_of(2, 16)]
    leaves[needed].requires_grad_()
    out = triton_lrpe(*leaves, torch.arange(5, device=DEVICE))
    (actual,) = torch.autograd.grad(out, leaves[needed], torch.ones_like(out))
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = naive_lrpe(*wide, torch.arange(5, device=DEVICE))
    assert_close("gradient", actual, torch.autograd.grad(expected, wide[needed], torch.ones_like(expected))[0])


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16)])
def test_lrpe_takes_no_rows(shape):
    B, T, H, K = shape
    leaf = theta_of(H, K).requires_grad_()
    out = triton_lrpe(normal(*shape), leaf, torch.arange(T, device=DEVICE))
    (dtheta,) = torch.autograd.grad(out.sum(), leaf)
    assert out.shape == (B, T, H, 2 * K)
    assert torch.equal(dtheta, torch.zeros_like(leaf))


def test_lrpe_phases_are_exact():
    # Rational arithmetic is the judge here: at these positions fp64 phases are off themselves.
    theta = torch.tensor([1.0, 0.7312, 3.1415927, 6.2831855, -2.5, 1e-3, 1e-8, 0.0, 12345.678], device=DEVICE)
    positions = [0, 1, -1, 3, 1000, 2**20 + 1, 2**27 + 13, -(2**28) + 5, 2**31 + 7]
    x = torch.ones(1, len(positions), 1, len(theta), device=DEVICE)
    out = triton_lrpe(x, theta.view(1, 1, -1), torch.tensor(positions, device=DEVICE))[0, :, 0].double().cpu()
    for row, position in zip(out, positions, strict=True):
        for k, value in enumerate(theta.double().tolist()):
            turns = Fraction(value) * position / (2 * PI)
            phase = float((turns - round(turns)) * 2 * PI)
            # fp64 holds theta / 2 pi to 2^-53 of itself, which the position multiplies; the rest is fp32 rounding.
            bound = abs(value * position) * 2.0**-52
            cos, sin = row[k].item(), row[k + len(theta)].item()
            assert abs(cos - math.cos(phase)) <= bound + 1.5e-7
            assert abs(sin - math.sin(phase)) <= bound + 2e-7 * min(1, abs(phase)) + 1e-15


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_lrpe_shows_a_theta_that_is_no_number():
    theta = torch.tensor([1.0, math.nan, math.inf, 2.0], device=DEVICE).view(1, 1, 4)
    out = triton_lrpe(normal(1, 3, 1, 4), theta, torch.arange(3, device=DEVICE))
    assert out.isnan().any(1).flatten().tolist() == [False, True, True, False] * 2


def test_lrpe_computes_the_phase_of_a_narrow_theta_in_fp32():
    x, theta, positions = normal(1, 5, 2, 16), theta_of(2, 16).half(), torch.arange(5, device=DEVICE)
    assert torch.equal(triton_lrpe(x, theta, positions), triton_lrpe(x, theta.float(), positions))


# As operators of torch

OPS = torch.ops.tnl_kernels


def op_cases():
    x, u, z = (last_quarter(2, 3, 8, seed=i) for i in range(3))
    heads = x.unflatten(-1, (2, 4))
    rotation = theta_of(2, 4), torch.arange(3, device=DEVICE)
    dout = normal(2, 3, 2, 8)
    return {
        "srmsnorm_fwd": (x, 1e-6),
        "srmsnorm_bwd": (x, u, z, 1e-6),
        "add_srmsnorm_fwd": (x, u, 1e-6),
        "gated_srmsnorm_fwd": (x, u, 1e-6),
        "gated_srmsnorm_bwd": (x, u, z, 1e-6),
        "sglu_fwd": (x, u),
        "sglu_bwd": (x, u, z),
        "lrpe_fwd": (heads, *rotation),
        "lrpe_bwd": (dout, heads, *rotation, True),
    }


@pytest.mark.parametrize("name", op_cases())
def test_is_an_operator_of_torch(name):
    arguments = op_cases()[name]
    if name.endswith("_fwd"):
        arguments = tuple(
            x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in arguments
        )
    library.opcheck(getattr(OPS, name).default, arguments)


def test_optional_arguments_are_operators_too():
    x, u = normal(2, 3, 8), normal(2, 3, 8, seed=1)
    library.opcheck(OPS.srmsnorm_bwd.default, (x, u, None, 1e-6))
    rotation = theta_of(2, 4), torch.arange(3, device=DEVICE)
    library.opcheck(OPS.lrpe_bwd.default, (normal(2, 3, 2, 8), x.unflatten(-1, (2, 4)), *rotation, False))


COMPILED = {
    "srmsnorm": lambda x, u, theta: triton_srmsnorm(x),
    "add_srmsnorm": lambda x, u, theta: torch.stack(triton_add_srmsnorm(x, u)),
    "gated_srmsnorm": lambda x, u, theta: triton_gated_srmsnorm(x, u),
    "sglu": lambda x, u, theta: triton_sglu(x, u),
    "lrpe": lambda x, u, theta: triton_lrpe(x.unflatten(-1, (2, 4)), theta, torch.arange(x.shape[1], device=x.device)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_one_graph(name):
    leaves = [normal(2, 3, 8), normal(2, 3, 8, seed=1), theta_of(2, 4)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    op = COMPILED[name]
    expected = op(*leaves)
    actual = torch.compile(op, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(actual, expected)
    gradients = [torch.autograd.grad(out.square().sum(), leaves, allow_unused=True) for out in (actual, expected)]
    for a, e in zip(*gradients, strict=True):
        assert (a is None and e is None) or torch.equal(a, e)


def test_checkpointing_can_keep_an_output_by_its_name():
    calls = []

    def policy(ctx, op, *args, **kwargs):
        calls.append(op)
        return (
            torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE
            if op == OPS.srmsnorm_fwd.default
            else torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
        )

    x = normal(2, 8).requires_grad_()
    out = torch.utils.checkpoint.checkpoint(
        lambda x: triton_srmsnorm(x) * 2,
        x,
        use_reentrant=False,
        context_fn=lambda: torch.utils.checkpoint.create_selective_checkpoint_contexts(policy),
    )
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert OPS.srmsnorm_fwd.default in calls
    assert_close("dx", dx, torch.autograd.grad((naive_srmsnorm(x) * 2).sum(), x)[0])


# What only a GPU shows


def variants(kernel):
    """How many compiled variants a kernel has on this device."""
    return len(kernel.device_caches[torch.cuda.current_device()][0])


@pytest.mark.gpu
def test_the_number_of_rows_compiles_nothing_new():
    counts = []
    for num_rows in (3, 1, 2, 16, 17, 160, 1024):
        check(triton_srmsnorm, naive_srmsnorm, [normal(num_rows, 112)], [normal(num_rows, 112, seed=1)])
        counts.append((variants(norm_triton.srmsnorm_fwd_kernel), variants(norm_triton.srmsnorm_bwd_kernel)))
    assert len(set(counts)) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [2**20 + 1])
def test_offsets_pass_31_bits(num_rows):
    x = torch.zeros(num_rows, 2048, device="cuda", dtype=torch.bfloat16)
    x[-1] = normal(2048, dtype=torch.bfloat16)
    assert_close("norm", triton_srmsnorm(x)[-1], naive_srmsnorm(x[-1].double()))
    assert_close("gate", triton_sglu(x, x)[-1], x[-1].double().square())
