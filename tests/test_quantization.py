"""Weights in 8 and 4 bits through transformers: near the full model, smaller, saved and loaded, adapted by LoRA."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from tests.closeness import assert_close
from tests.tiny_model import random_ids, tiny_model
from tnl.model.adapters import lora_config

IDS = random_ids(2, 9)
# Wide enough for the quantisers' groups of 32 and 64 weights.
SIZES = dict(decoder_embed_dim=128, glu_dim=256)


def torchao_int8(**options):
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2), **options)


def torchao_int4(**options):
    # The form of 4 bits that runs on CPUs, each in a byte of its own; Int4WeightOnlyConfig, two in a byte, needs a GPU.
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), **options)


@dataclass
class Method:
    """A quantiser, how far logits of random weights may move, and its bytes for four of the blocks' weights in fp32."""

    package: str
    make: callable
    bound: float
    share: float


# 4 bits round random weights by about a tenth of their size; four rounded factors meet in each block's q, k, v and u.
METHODS = {
    "torchao int8": Method("torchao", torchao_int8, 0.05, 0.26),
    "torchao int4": Method("torchao", torchao_int4, 0.6, 0.30),
    "bitsandbytes int8": Method("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True), 0.06, 0.26),
    "bitsandbytes nf4": Method(
        "bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.6, 0.15
    ),
}


@pytest.fixture(params=METHODS)
def method(request) -> Method:
    pytest.importorskip(METHODS[request.param].package)
    return METHODS[request.param]


@pytest.fixture
def saved(tmp_path):
    """A model and its folder."""
    model = tiny_model(**SIZES)
    model.save_pretrained(tmp_path / "full")
    return model, tmp_path / "full"


def load(folder, quantization):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)


def weight_bytes(module) -> int:
    """Bytes of a module's weights as they are kept."""

    def kept(weight):
        if hasattr(weight, "__tensor_flatten__"):
            return sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])
        return weight.nbytes

    return sum(map(kept, module.parameters()))


def assert_loss_is_that_of_the_logits(model):
    output = model(IDS, labels=IDS, output_logits=True)
    assert_close("loss", output.loss, F.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))


def test_logits_stay_near_the_full_model(method, saved):
    model, folder = saved
    quantized = load(folder, method.make())
    assert not torch.equal(quantized(IDS).logits, model(IDS).logits)
    assert_close("logits", quantized(IDS).logits, model(IDS).logits, method.bound)


def test_blocks_are_smaller_and_the_tied_head_is_left_alone(method, saved):
    model, folder = saved
    quantized = load(folder, method.make())
    assert weight_bytes(quantized.model.layers) < method.share * weight_bytes(model.model.layers)
    assert quantized.lm_head.weight is quantized.model.embed_tokens.weight
    assert torch.equal(quantized.lm_head.weight, model.lm_head.weight)


def test_the_loss_is_that_of_the_logits(method, saved):
    assert_loss_is_that_of_the_logits(load(saved[1], method.make()))


def test_generation_repeats_the_greedy_choice_of_the_logits(method, saved):
    quantized = load(saved[1], method.make())
    tokens = quantized.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        assert torch.equal(quantized(tokens).logits[:, 8:-1].argmax(-1), tokens[:, 9:])


def test_a_quantized_model_is_saved_and_loaded(method, saved, tmp_path):
    quantized = load(saved[1], method.make())
    # Before its first step without gradients, in which bitsandbytes packs 4-bit weights anew for the CPU.
    quantized.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    assert weight_bytes(loaded) == weight_bytes(quantized)
    assert torch.equal(loaded(IDS).logits, quantized(IDS).logits)


def test_lora_trains_on_quantized_weights(method, saved, tmp_path):
    def base():
        return prepare_model_for_kbit_training(load(saved[1], method.make()))

    model = base()
    model = get_peft_model(model, lora_config(model.config, r=4)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("name", ["torchao int8", "torchao int4"])
def test_torchao_computes_with_the_rounded_weights(name, saved):
    pytest.importorskip("torchao")
    model, folder = saved
    quantized = load(folder, METHODS[name].make())
    with torch.no_grad():
        for weight, rounded in zip(model.parameters(), quantized.parameters(), strict=True):
            weight.copy_(rounded.dequantize() if hasattr(rounded, "__tensor_flatten__") else rounded)
    assert_close("logits", quantized(IDS).logits, model(IDS).logits)


def test_the_loss_of_a_quantized_head_is_that_of_its_logits(tmp_path):
    pytest.importorskip("torchao")
    tiny_model(**SIZES, tie_word_embeddings=False).save_pretrained(tmp_path)
    quantized = load(tmp_path, torchao_int8(include_input_output_embeddings=True))
    assert hasattr(quantized.lm_head.weight, "__tensor_flatten__")
    assert_loss_is_that_of_the_logits(quantized)
