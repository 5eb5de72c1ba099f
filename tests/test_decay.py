"""The slopes of the heads: values, and fp32 tensors that no mode of torch can spoil."""

import math

import pytest
import torch

from tests.closeness import assert_close
from tests.reference_model import reference_slopes
from tnl.model.decay import DECAYS, alibi_slopes, decay_slopes, slopes_tensor


def test_alibi_slopes_of_a_power_of_two_are_the_geometric_series():
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


def test_alibi_slopes_of_twenty_heads_interleave():
    slopes = alibi_slopes(20)
    assert slopes[:16] == [2 ** (-(h + 1) / 2) for h in range(16)]
    assert slopes[16:] == pytest.approx([2**-0.25, 2**-0.75, 2**-1.25, 2**-1.75], rel=1e-15)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("num_heads", "num_layers"), [(1, 1), (8, 24), (20, 32), (40, 42)])
def test_slopes_of_every_layer_equal_the_formula(decay, num_heads, num_layers):
    for layer in range(num_layers):
        slopes = torch.tensor(decay_slopes(decay, num_heads, layer, num_layers), dtype=torch.float64)
        assert_close(f"layer {layer}", slopes, reference_slopes(decay, num_heads, layer, num_layers))


def test_the_last_released_layer_hardly_decays_and_the_first_decays_fully():
    assert decay_slopes("released", 4, 15, 16) == pytest.approx([s * 1e-5 for s in alibi_slopes(4)])
    assert decay_slopes("released", 4, 0, 16) == pytest.approx([s * (1 + 1e-5) for s in alibi_slopes(4)])


def test_a_single_layer_has_factor_one():
    assert decay_slopes("released", 4, 0, 1) == tuple(alibi_slopes(4))


def test_an_unknown_decay_lists_the_known():
    with pytest.raises(ValueError, match="'fast' is unknown, use one of released, paper, none"):
        decay_slopes("fast", 4, 0, 2)


def test_slopes_are_fp32_whatever_the_default_dtype():
    slopes = (1 / 3, math.pi / 1000)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        tensor = slopes_tensor(slopes, torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)
    assert tensor.dtype == torch.float32
    assert tensor.tolist() == pytest.approx(slopes, rel=1e-7)


def test_slopes_first_used_under_inference_mode_serve_a_later_backward_pass():
    slopes = (0.123, 0.456)
    with torch.inference_mode():
        slopes_tensor(slopes, torch.device("cpu"))
    x = torch.ones(2, requires_grad=True)
    (x * slopes_tensor(slopes, torch.device("cpu"))).sum().backward()
    assert x.grad.tolist() == pytest.approx(slopes)
