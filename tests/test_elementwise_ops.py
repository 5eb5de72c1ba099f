"""Norms, gate and LRPE against their definitions in fp64, forward and backward."""

import math

import pytest
import torch
from tnl_kernels import add_srmsnorm, fork_srmsnorm, gated_srmsnorm, lightning_attention, lrpe, sglu, srmsnorm
from tnl_kernels.naive import (
    naive_add_srmsnorm,
    naive_gated_srmsnorm,
    naive_lrpe,
    naive_sglu,
    naive_srmsnorm,
)

from tests.closeness import assert_close

HALF_AND_FULL = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check_against_definition(op, definition, inputs, dout, ratio=None):
    """Output and gradients of ``op(*inputs)`` against ``definition`` on the same values in fp64."""
    results = []
    for form, leaves, gradient in ((op, inputs, dout), (definition, [x.double() for x in inputs], dout.double())):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        out = form(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, gradient)))
    for i, (a, e) in enumerate(zip(*results, strict=True)):
        assert_close("out" if i == 0 else f"gradient {i - 1}", a, e, ratio)


@HALF_AND_FULL
@pytest.mark.parametrize("D", [3, 96, 1000])
def test_srmsnorm_equals_the_definition(dtype, D):
    check_against_definition(
        srmsnorm, naive_srmsnorm, [normal(2, 7, D, dtype=dtype)], normal(2, 7, D, seed=1, dtype=dtype)
    )


@HALF_AND_FULL
def test_gated_srmsnorm_equals_the_definition(dtype):
    inputs = [normal(2, 7, 96, dtype=dtype), normal(2, 7, 96, seed=1, dtype=dtype)]
    check_against_definition(gated_srmsnorm, naive_gated_srmsnorm, inputs, normal(2, 7, 96, seed=2, dtype=dtype))


def test_gated_srmsnorm_takes_strided_views():
    packed = normal(2, 7, 4 * 96)
    o, u = normal(2, 7, 2, 48, seed=1).flatten(2), packed[..., -96:]
    assert torch.equal(gated_srmsnorm(o, u), gated_srmsnorm(o, u.contiguous()))


def test_norms_of_a_zero_row_are_zero_with_finite_gradients():
    x = torch.zeros(3, 8, requires_grad=True)
    y = srmsnorm(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros(3, 8))
    assert_close("dx", dx, torch.full((3, 8), 1e3, dtype=torch.float64))


@HALF_AND_FULL
def test_fork_srmsnorm_is_the_norm_beside_its_input(dtype):
    x = normal(2, 7, 96, dtype=dtype).requires_grad_()
    y, same = fork_srmsnorm(x)
    assert torch.equal(y, srmsnorm(x))
    assert torch.equal(same, x)
    dy, dsame = normal(2, 7, 96, seed=2, dtype=dtype), normal(2, 7, 96, seed=3, dtype=dtype)
    (dx,) = torch.autograd.grad((y, same), x, (dy, dsame))
    (through_norm,) = torch.autograd.grad(srmsnorm(x), x, dy)
    assert torch.equal(dx, through_norm + dsame)


@HALF_AND_FULL
def test_add_srmsnorm_equals_the_definition(dtype):
    x, residual = normal(2, 7, 96, dtype=dtype), normal(2, 7, 96, seed=1)
    doutputs = normal(2, 7, 96, seed=2, dtype=dtype), normal(2, 7, 96, seed=3)
    results = []
    for op, wide in ((add_srmsnorm, False), (naive_add_srmsnorm, True)):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in (x, residual)]
        outputs = op(*leaves)
        gradients = torch.autograd.grad(outputs, leaves, [t.double() if wide else t for t in doutputs])
        results.append((*outputs, *gradients))
    for name, a, e in zip(("y", "residual", "dx", "dresidual"), *results, strict=True):
        assert_close(name, a, e)


@HALF_AND_FULL
def test_sglu_equals_the_definition(dtype):
    inputs = [normal(2, 7, 33, dtype=dtype), normal(2, 7, 33, seed=1, dtype=dtype)]
    check_against_definition(sglu, naive_sglu, inputs, normal(2, 7, 33, seed=2, dtype=dtype))


def lrpe_inputs(T, *, first=0, B=2, H=2, K=16, dtype=torch.float32):
    """x, theta as the model initialises it, positions from ``first`` on."""
    D = H * K
    theta = 10000 ** (-2 * torch.arange(D, dtype=torch.float64) / D)
    return normal(B, T, H, K, dtype=dtype), theta.float().view(H, 1, K), torch.arange(first, first + T)


@HALF_AND_FULL
@pytest.mark.parametrize("first", [0, 2**14, 10**6])
def test_lrpe_equals_the_definition_at_any_position(dtype, first):
    x, theta, positions = lrpe_inputs(50, first=first, dtype=dtype)
    theta = theta.requires_grad_()
    dout = normal(2, 50, 2, 32, seed=1, dtype=dtype)
    wide_theta = theta.detach().double().requires_grad_()
    x.requires_grad_()
    wide_x = x.detach().double().requires_grad_()
    out, expected = lrpe(x, theta, positions), naive_lrpe(wide_x, wide_theta, positions)
    assert_close("out", out, expected)
    actual = torch.autograd.grad(out, (x, theta), dout)
    for name, a, e in zip(
        ("dx", "dtheta"), actual, torch.autograd.grad(expected, (wide_x, wide_theta), dout.double()), strict=True
    ):
        assert_close(name, a, e)


def test_lrpe_phase_in_fp32_would_fail_this_bound():
    x, theta, positions = lrpe_inputs(50, first=10**6)
    phase = positions[:, None, None].float() * theta[:, 0]
    careless = torch.cat((x * phase.cos(), x * phase.sin()), -1)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_close("out", careless, naive_lrpe(x.double(), theta.double(), positions))


def test_lrpe_depends_on_differences_of_positions():
    q, theta, positions = lrpe_inputs(50)
    k = normal(2, 50, 2, 16, seed=1)
    near, far = ((lrpe(q, theta, p) * lrpe(k, theta, p - 7)).sum(-1) for p in (positions, positions + 10**6))
    assert_close("product", far, near.double())


def test_lrpe_takes_positions_of_each_row():
    x, theta, positions = lrpe_inputs(50)
    rows = torch.stack((positions, positions + 5))
    out = lrpe(x, theta, rows)
    assert torch.equal(out[0], lrpe(x, theta, positions)[0])
    assert torch.equal(out[1], lrpe(x, theta, positions + 5)[1])


def test_lrpe_computes_the_phase_of_a_bf16_theta_in_fp32():
    x, theta, positions = lrpe_inputs(50)
    theta = theta.bfloat16()
    assert torch.equal(lrpe(x, theta, positions), lrpe(x, theta.float(), positions))


def test_lrpe_feeds_the_attention_with_doubled_keys():
    x, theta, positions = lrpe_inputs(50)
    q, k = lrpe(x, theta, positions), lrpe(x.flip(1), theta, positions)
    o, _ = lightning_attention(q, k, x, torch.zeros(2))
    distance = positions[:, None] - positions
    cosines = torch.cos(distance[:, :, None, None].double() * theta[:, 0].double())  # [T, T, H, K]
    scores = torch.einsum("bthk,bshk,tshk->bhts", x.double(), x.flip(1).double(), cosines).tril()
    assert_close("o", o, torch.einsum("bhts,bshv->bthv", scores, x.double()))


def test_gradcheck():
    x, u = (normal(2, 3, 4, dtype=torch.float64, seed=i).requires_grad_() for i in range(2))
    assert torch.autograd.gradcheck(srmsnorm, x)
    assert torch.autograd.gradcheck(gated_srmsnorm, (x, u))
    assert torch.autograd.gradcheck(add_srmsnorm, (x, u))
    assert torch.autograd.gradcheck(sglu, (x, u))
    for positions in (torch.tensor([0, 3, 10**4]), torch.tensor([[0, 1, 2], [5, 6, 7]])):
        theta = torch.tensor([[[0.3, 0.01]], [[1.0, 1e-3]]], dtype=torch.float64, requires_grad=True)
        y = normal(2, 3, 2, 2, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda y, theta, p=positions: lrpe(y, theta, p), (y, theta), atol=1e-4)


def test_runs_are_bitwise_equal():
    x, theta, positions = lrpe_inputs(500)
    theta.requires_grad_()
    first, second = (torch.autograd.grad(srmsnorm(lrpe(x, theta, positions)).sum(), theta)[0] for _ in range(2))
    assert torch.equal(first, second)


X = torch.zeros(2, 3, 2, 4)
THETA = torch.full((2, 1, 4), math.pi)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: srmsnorm(X.long()), "x: got dtype int64, expected float32, bfloat16, float16, float64"),
        (lambda: gated_srmsnorm(X, X[:1]), r"u: got shape \(1, 3, 2, 4\), expected the shape of o"),
        (lambda: gated_srmsnorm(X, X.bfloat16()), "u: got dtype bfloat16, expected float32"),
        (lambda: add_srmsnorm(X, X[:1]), r"residual: got shape \(1, 3, 2, 4\)"),
        (lambda: sglu(X, X[:1]), r"b: got \(1, 3, 2, 4\) torch.float32, expected \(2, 3, 2, 4\)"),
        (lambda: lrpe(X[0], THETA, torch.arange(3)), r"x: got shape \(3, 2, 4\), expected \[B, T, H, K\]"),
        (
            lambda: lrpe(X, THETA[:, 0], torch.arange(3)),
            r"theta: got shape \(2, 4\), expected \[H, 1, K\] = \(2, 1, 4\)",
        ),
        (lambda: lrpe(X, THETA, torch.arange(4)), r"positions: got shape \(4,\), expected \[T\] = \(3,\) or"),
        (lambda: lrpe(X, THETA, torch.arange(3).int()), "positions: got dtype int32, expected int64"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sglu_refuses_integers():
    with pytest.raises(ValueError, match="a: got dtype int64, expected float32"):
        sglu(torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
