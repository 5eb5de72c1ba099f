"""Logits, gradients and phases equal the mathematics, on every way through the model."""

import functools

import pytest
import torch
import torch.nn.functional as F
from tnl_kernels.naive import naive_lrpe

from tests.closeness import RATIO, assert_close
from tests.reference_model import expected_logits
from tests.tiny_model import random_ids, tiny_model
from tnl.config import load
from tnl.model import TransnormerState
from tnl.model.lrpe import Lrpe
from tnl.model.settings import ModelSettings

HEAD_DIM = 4
# Released checkpoint: the shipped configuration, what differs from it, its number of layers here.
RELEASED = {
    "TransNormerLLM-385M": ("tnl-385m", {}, 4),
    "TransNormerLLM-1B": ("tnl-1b", {}, 3),
    "TransNormerLLM-7B": ("tnl-7b", {}, 3),
    "TransNormerLLM2-1B": ("tnl-1b", dict(no_scale_embedding=True), 3),
    "TransNormerLLM2-3B": ("tnl-3b", {}, 3),
    "TransNormerLLM3-15B": ("tnl-15b", {}, 3),
    "TransNormerLLM3-15B, layernorm, no LRPE": (
        "tnl-15b",
        dict(mixer_norm_type="layernorm", linear_use_lrpe_list=[]),
        2,
    ),
}
SHRUNK = [(name, num_heads) for name in RELEASED for num_heads in (4, 8, 20)]
SHRUNK += [(name, 40) for name in RELEASED if "15B" in name]


def shrunk_model(name, num_heads, **values):
    """A small model with the switches of a released one; ``values`` replace."""
    preset, differs, num_layers = RELEASED[name]
    config = load(ModelSettings, f"model/{preset}").to_config()
    switches = dict(
        linear_act_fun=config.linear_act_fun,
        linear_use_lrpe_list=config.linear_use_lrpe_list[:num_layers],
        decay=config.decay,
        no_scale_embedding=config.no_scale_embedding,
        tie_word_embeddings=config.tie_word_embeddings,
        gate_dim=config.gate_dim,
        mixer_norm_type=config.mixer_norm_type,
        decoder_layers=num_layers,
        decoder_attention_heads=num_heads,
        decoder_embed_dim=num_heads * HEAD_DIM,
    )
    return tiny_model(**(switches | differs | values))


@functools.cache
def shrunk_case(name, num_heads):
    """A `shrunk_model`, ids, and their logits in fp64."""
    model, ids = shrunk_model(name, num_heads), random_ids(2, 70)
    return model, ids, expected_logits(model, ids)


@pytest.mark.parametrize("piece", [70, 32, 1], ids=["at once", "in pieces", "step by step"])
@pytest.mark.parametrize(("name", "num_heads"), SHRUNK)
def test_logits_equal_the_mathematics_for_every_released_model(name, num_heads, piece):
    model, ids, expected = shrunk_case(name, num_heads)
    state = TransnormerState()
    with torch.no_grad():
        logits = torch.cat([model(part, past_key_values=state).logits for part in ids.split(piece, 1)], 1)
    assert_close("logits", logits, expected)


@pytest.mark.parametrize(
    "values",
    [
        dict(),
        dict(gate_dim=5),
        dict(gate_dim=5, mixer_norm_type="layernorm"),
        dict(mixer_norm_type="layernorm"),
        dict(lrpe_phase_dtype="activation"),
    ],
    ids=str,
)
def test_gradients_equal_those_of_the_mathematics(values):
    model, ids = tiny_model(**values), random_ids(2, 70)
    model(ids, labels=ids).loss.backward()
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    logits = expected_logits(model, ids, weights)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, p in model.named_parameters():
        assert_close(name, p.grad, weights[name].grad)


@pytest.mark.parametrize("name", RELEASED)
def test_logits_equal_the_mathematics_with_the_other_scale_of_embeddings(name):
    config, ids = shrunk_case(name, 8)[0].config, random_ids(2, 70)
    model = shrunk_model(name, 8, no_scale_embedding=not config.no_scale_embedding)
    with torch.no_grad():
        assert_close("logits", model(ids).logits, expected_logits(model, ids))


# Phases


def rotated(phase_dtype, dtype, positions):
    """A random x [2, T, 4, 16] in ``dtype``, an `Lrpe` with a theta as in a new model, and what it makes of x."""
    encoding = Lrpe(4, 16, phase_dtype)
    theta = 10000.0 ** (-2 * torch.arange(64) / 64)
    encoding.theta = torch.nn.Parameter(theta.view(4, 1, 16).to(dtype), requires_grad=False)
    x = torch.randn(2, positions.shape[-1], 4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x, encoding.theta, encoding(x, positions)


def test_phases_in_fp32_activations_agree_with_exact_ones_at_small_positions():
    positions = torch.arange(64)
    _, _, exact = rotated("float32", torch.float32, positions)
    _, _, rounded = rotated("activation", torch.float32, positions)
    assert_close("rotated", rounded, exact)
    assert not torch.equal(rounded, exact)


def test_phases_in_bf16_activations_are_those_of_plain_bf16_arithmetic():
    x, theta, actual = rotated("activation", torch.bfloat16, torch.arange(512))
    index = torch.arange(512).bfloat16().reshape(1, -1, 1)
    phase = theta * index  # [H, T, K]
    assert phase.dtype == torch.bfloat16
    x = x.transpose(1, 2)  # [B, H, T, K]
    expected = torch.concat([x * torch.cos(phase), x * torch.sin(phase)], dim=-1)
    assert torch.equal(actual, expected.transpose(1, 2))


def test_bf16_phases_are_far_from_exact_ones():
    positions = torch.arange(512)
    x, theta, rounded = rotated("activation", torch.bfloat16, positions)
    _, _, exact = rotated("float32", torch.bfloat16, positions)
    assert_close("exact phases", exact, naive_lrpe(x.double(), theta, positions), RATIO[torch.bfloat16])
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_close("rounded phases", rounded, exact, 0.05)


@pytest.mark.parametrize(("phase_dtype", "collide"), [("activation", True), ("float32", False)])
def test_bf16_positions_above_256_collide_only_in_the_dtype_of_the_activations(phase_dtype, collide):
    x, theta, _ = rotated(phase_dtype, torch.bfloat16, torch.zeros(1, dtype=torch.int64))
    encoding = Lrpe(4, 16, phase_dtype)
    encoding.theta = theta
    first, second = (encoding(x, torch.tensor([position])) for position in (256, 257))
    assert torch.equal(first, second) == collide


@pytest.mark.parametrize("piece", [32, 1])
def test_a_model_with_phases_in_the_activations_dtype_reads_on_from_its_state(piece):
    model, ids, state = tiny_model(lrpe_phase_dtype="activation"), random_ids(2, 70), TransnormerState()
    with torch.no_grad():
        logits = torch.cat([model(part, past_key_values=state).logits for part in ids.split(piece, 1)], 1)
        assert_close("logits", logits, model(ids).logits)
        assert not torch.equal(model(ids).logits, tiny_model()(ids).logits)
