"""The token mixer of TransNormerLLM3 behaves as the other one does: names, selection, packing, states, every route."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from tests.closeness import assert_close
from tests.reference_model import expected_logits, reference_slopes
from tests.tiny_model import random_ids, tiny_config, tiny_model
from tnl.model import TransnormerConfig, TransnormerForCausalLM
from tnl.model.mixers import LowRankGateMixer, TokenMixer

LENGTHS = [5, 1, 70, 1, 12]
# What a config.json of the 15B holds, of a size for a test.
RELEASED_15B = dict(
    architectures=["TransnormerForCausalLM"],
    auto_map={"AutoConfig": "configuration_transnormer.TransnormerConfig"},
    model_type="transnormer",
    pad_token_id=100262,
    bos_token_id=100261,
    eos_token_id=100257,
    vocab_size=100280,
    use_cache=True,
    init_std=0.02,
    decoder_embed_dim=80,
    decoder_layers=2,
    decoder_attention_heads=40,
    no_scale_embedding=False,
    norm_type="simplermsnorm",
    linear_use_lrpe_list=[1, 0],
    hidden_dim=80,
    linear_act_fun="swish",
    glu_dim=96,
    gate_dim=16,
    bias=False,
    torch_dtype="bfloat16",
)


class CalledOperators(TorchDispatchMode):
    """The names of torch's operators that are called within."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(str(operator.overloadpacket))
        return operator(*args, **(kwargs or {}))


def low_rank_model(**values):
    return tiny_model(**(dict(gate_dim=5) | values))


@pytest.fixture(scope="module")
def model():
    return low_rank_model()


def test_the_parameters_have_the_released_names_and_shapes():
    shapes = {name: tuple(w.shape) for name, w in low_rank_model(hidden_dim=64).state_dict().items()}
    prefix = "model.layers.0.token_mixer."
    assert {name: shape for name, shape in shapes.items() if name.startswith(prefix)} == {
        prefix + "qkv_proj.weight": (3 * 64, 32),
        prefix + "output_gate.0.weight": (5, 32),
        prefix + "output_gate.1.weight": (64, 5),
        prefix + "out_proj.weight": (32, 64),
        prefix + "lrpe.theta": (4, 1, 16),
    }


def test_a_released_config_of_the_15b_selects_the_mixer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_15B))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (100262, 100261, 100257)
    assert (config.gate_dim, config.mixer_norm_type, config.tie_word_embeddings) == (16, "simplermsnorm", True)
    model, ids = TransnormerForCausalLM(config).eval(), random_ids(1, 30)
    mixers = [layer.token_mixer for layer in model.model.layers]
    assert all(type(mixer) is LowRankGateMixer for mixer in mixers)
    assert [mixer.lrpe is not None for mixer in mixers] == [True, False]
    for i, mixer in enumerate(mixers):
        slopes = torch.tensor(mixer.slopes, dtype=torch.float64)
        assert_close("slopes", slopes, reference_slopes("released", 40, i, 2))
    with torch.no_grad():
        assert_close("logits", model(ids).logits, expected_logits(model, ids))


@pytest.mark.parametrize("values", [{}, dict(gate_dim=None)], ids=str)
def test_a_config_without_a_gate_dim_selects_the_other_mixer(values):
    assert type(TransnormerForCausalLM(tiny_config(**values)).model.layers[0].token_mixer) is TokenMixer


def test_the_switches_survive_saving(tmp_path):
    values = dict(gate_dim=5, mixer_norm_type="layernorm", lrpe_phase_dtype="activation")
    tiny_config(**values).save_pretrained(tmp_path)
    config = TransnormerConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in values} == values


def test_logits_equal_the_reference_without_activation():
    model, ids = low_rank_model(linear_act_fun="none"), random_ids(2, 70)
    with torch.no_grad():
        assert_close("logits", model(ids).logits, expected_logits(model, ids))


def test_packed_logits_equal_those_of_each_document_alone(model):
    ids, offsets = random_ids(1, sum(LENGTHS)), torch.tensor([0, *LENGTHS]).cumsum(0).int()
    with torch.no_grad():
        alone = torch.cat([model(document).logits for document in ids.split(LENGTHS, 1)], 1)
        assert_close("logits", model(ids, cu_seqlens=offsets).logits, alone)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_generates_what_each_prompt_generates_alone(model, side):
    prompts = [random_ids(n, seed=n) for n in (3, 1, 40)]
    ids, mask = torch.zeros(3, 40, dtype=torch.int64), torch.zeros(3, 40, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        place = slice(40 - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    options = dict(max_new_tokens=6, do_sample=False)
    together = model.generate(ids, attention_mask=mask, **options)[:, 40:]
    alone = [model.generate(p[None], attention_mask=torch.ones_like(p[None]), **options)[0, len(p) :] for p in prompts]
    assert torch.equal(together, torch.stack(alone))


def test_a_step_updates_the_state_in_place(model):
    with torch.no_grad():
        state = model(random_ids(2, 9), use_cache=True).past_key_values
        layers = list(state.layers)
        before = [layer.clone() for layer in layers]
        model(random_ids(2, 1, seed=1), past_key_values=state)
    assert all(a is b for a, b in zip(state.layers, layers, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(layers, before, strict=True))


@pytest.mark.parametrize(
    "values",
    [dict(gate_dim=None), dict(), dict(mixer_norm_type="layernorm"), dict(lrpe_phase_dtype="activation")],
    ids=str,
)
def test_a_step_asks_no_tensor_for_its_values(values):
    # On a GPU the answer would stop the host, and a CUDA graph could not hold it.
    model, ids = low_rank_model(**values), random_ids(2, 9)
    with torch.no_grad():
        state = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=state)
        with CalledOperators() as operators:
            model(ids[:, :1], past_key_values=state)
    assert "aten.mm" in operators.names
    assert not operators.names & {"aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero"}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    model, ids = low_rank_model().train(), random_ids(1, sum(LENGTHS))
    inputs = dict(input_ids=ids, labels=ids, cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int())
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for (name, _), a, b in zip(model.named_parameters(), *gradients, strict=True):
        assert_close(name, b, a)


@pytest.mark.parametrize("norm", ["simplermsnorm", "layernorm"])
def test_bf16_logits_stay_near_the_reference_of_the_same_rounded_weights(norm):
    model, ids = low_rank_model(mixer_norm_type=norm).bfloat16(), random_ids(2, 150)
    with torch.no_grad():
        # Every product and sum on the residual stream is rounded; gates and scores multiply rounded factors.
        assert_close("logits", model(ids).logits, expected_logits(model, ids), 2e-2)


@pytest.mark.parametrize("norm", ["simplermsnorm", "layernorm"])
def test_autocast_logits_stay_near_the_reference(norm):
    model, ids = low_rank_model(mixer_norm_type=norm), random_ids(2, 150)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        # As in bf16, but the residual stream is fp32.
        assert_close("logits", model(ids).logits, expected_logits(model, ids), 2e-2)


# Routes


def test_a_model_loaded_in_bf16_equals_the_saved_one_cast_to_bf16(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), random_ids(1, 30)
    mixers = zip(loaded.model.layers, model.model.layers, strict=True)
    assert all(a.token_mixer.slopes == b.token_mixer.slopes for a, b in mixers)
    assert torch.equal(loaded(ids).logits, low_rank_model().bfloat16()(ids).logits)


def test_a_model_built_on_the_meta_device_and_then_loaded_computes_the_same(model):
    ids = random_ids(1, 30)
    with torch.device("meta"):
        built = TransnormerForCausalLM(model.config)
    built.to_empty(device="cpu")
    built.tie_weights()
    built.load_state_dict(model.state_dict())
    assert torch.equal(built.eval()(ids).logits, model(ids).logits)
