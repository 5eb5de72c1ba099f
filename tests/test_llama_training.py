"""The LLaMA baseline in the TNL's training loop: exact packing, the same loss, a checkpoint that transformers loads."""

import io
import json
import math

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.closeness import assert_close
from tests.tiny_corpus import tiny_shards
from tests.tiny_model import random_ids, tiny_config
from tests.tiny_run import VOCAB_SIZE, rows, tiny_run, trajectory
from tnl.data.shards import ShardSet
from tnl.errors import ConfigError
from tnl.evaluation.heldout import heldout_loss
from tnl.model.baseline import llama_config
from tnl.model.baseline_training import LlamaBaseline
from tnl.model.flops import num_parameters as tnl_num_parameters
from tnl.model.kinds import model_config, num_parameters, training_flops_per_token
from tnl.training.export import export_run, resolve_model
from tnl.training.pretrain import pretrain

LENGTHS = [5, 1, 70, 1, 12]
LLAMA = "model.kind=llama"


def tiny_llama(**overrides) -> LlamaBaseline:
    """A baseline whose weights are large enough that attention shows in the logits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaBaseline(llama_config(tiny_config(), max_position_embeddings=128, **overrides)).eval()


def plain(model: LlamaBaseline) -> LlamaForCausalLM:
    """transformers' own class with the same weights."""
    heads = model.config.num_key_value_heads
    config = llama_config(tiny_config(), max_position_embeddings=128, num_key_value_heads=heads)
    reference = LlamaForCausalLM(config).eval()
    reference.load_state_dict(model.state_dict())
    return reference


def packed_ids():
    ids = random_ids(1, sum(LENGTHS))
    return ids, torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_logits_are_those_of_transformers_own_class(kv_heads):
    model, ids = tiny_llama(num_key_value_heads=kv_heads), random_ids(2, 33)
    assert_close("logits", model(ids).logits, plain(model)(ids).logits)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_documents_are_exactly_those_alone(kv_heads):
    model, (ids, cu_seqlens) = tiny_llama(num_key_value_heads=kv_heads), packed_ids()
    reference = plain(model)
    alone = torch.cat([reference(document).logits for document in ids.split(LENGTHS, 1)], 1)
    assert_close("logits", model(ids, cu_seqlens=cu_seqlens).logits, alone)


@pytest.mark.gpu
def test_packed_documents_are_those_alone_in_one_call_of_flash_attention():
    model, (ids, cu_seqlens) = tiny_llama().cuda().bfloat16(), packed_ids()
    ids = ids.cuda()
    alone = torch.cat([model(document).logits for document in ids.split(LENGTHS, 1)], 1)
    assert_close("logits", model(ids, cu_seqlens=cu_seqlens.cuda()).logits, alone, 2e-2)


def test_a_token_of_one_document_changes_no_other():
    model, (ids, cu_seqlens) = tiny_llama(), packed_ids()
    before = model(ids, cu_seqlens=cu_seqlens).logits
    other = ids.clone()
    other[0, 10] += 1  # in the third document, positions 6 to 75
    changed = (model(other, cu_seqlens=cu_seqlens).logits != before).any(-1)[0].nonzero().flatten()
    assert changed.min() == 10
    assert changed.max() == 75


@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_loss_and_gradients_equal_the_sum_over_documents(checkpointed):
    model, (ids, cu_seqlens) = tiny_llama().train(), packed_ids()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    labels = ids.clone()
    labels[0, cu_seqlens[:-1].long()] = -100
    packed = model(ids, labels=labels, cu_seqlens=cu_seqlens)
    packed.loss_sum.backward()
    reference = plain(model)
    losses = [reference(d, labels=d).loss * (d.shape[1] - 1) for d in ids.split(LENGTHS, 1) if d.shape[1] > 1]
    sum(losses).backward()
    assert packed.num_tokens == sum(LENGTHS) - len(LENGTHS)
    assert_close("loss", packed.loss_sum, sum(losses))
    for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert_close(name, p.grad, q.grad)


def test_rotary_phases_survive_bf16():
    model = tiny_llama()
    positions = torch.tensor([[0, 1, 1001, 1002, 100_003]])
    exact = model.model.rotary_emb(torch.zeros(1), positions)
    cast = model.to(torch.bfloat16).model.rotary_emb(torch.zeros(1), positions)
    for a, b in zip(cast, exact, strict=True):
        assert torch.equal(a, b)
    head_dim = model.config.head_dim
    angle = 1002 * 10000 ** (-2 / head_dim)
    assert exact[0][0, 3, 1].item() == pytest.approx(math.cos(angle), abs=1e-4)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"use_cache": True}, "a state to carry"),
        ({"past_key_values": object()}, "a state to carry"),
        ({"attention_mask": torch.ones(1, 9)}, "got attention_mask"),
        ({"labels": random_ids(1, 9), "shift_labels": random_ids(1, 9)}, "not both"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "last offset"),
    ],
)
def test_what_a_llama_does_not_do_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_llama()(random_ids(1, 9), **inputs)


def test_scaled_rotary_positions_are_refused():
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type: 'linear'"):
        tiny_llama(rope_parameters=scaled)


def test_counts():
    config = llama_config(tiny_config(tie_word_embeddings=False))
    with torch.device("meta"):
        model = LlamaBaseline(config)
    assert num_parameters(config) == model.num_parameters()
    # Twice as long, each token reads twice as much: 12 operations per head, its width and further token read.
    more = training_flops_per_token(config, 2048) - training_flops_per_token(config, 1024)
    assert more == 2 * 4 * 8 * 12 * (2048 - 1024) / 2
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    reads = 2 * 4 * 8 * 12 * (1 + 1) / 2
    assert training_flops_per_token(config, 1) == 6 * weights + reads


# The run


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("data"), heldout_fraction=0.1)


def train(settings) -> str:
    out = io.StringIO()
    assert pretrain(settings, console=Console(file=out, width=200)) == "finished"
    return out.getvalue()


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A run of the baseline over 12 steps, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "llama"
    return output, train(tiny_run(shards, output, LLAMA))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export_run(run[0], tmp_path_factory.mktemp("exports") / "llama")


def test_it_learns_in_the_same_loop(run, shards):
    output, text = run
    losses = [row["loss"] for row in rows(output)]
    assert losses[0] == pytest.approx(math.log(VOCAB_SIZE), abs=0.3)
    assert losses[-1] < losses[0] - 0.3
    assert all(row["grad_norm"] > 0 and 0 < row["mfu"] < 1 for row in rows(output))
    settings = tiny_run(shards, output, LLAMA)
    network = model_config(settings.model, 32)
    assert f"{num_parameters(network):,} parameters" in text
    assert abs(num_parameters(network) / tnl_num_parameters(settings.model.to_config()) - 1) <= 0.005
    assert network.max_position_embeddings == 32


def test_it_resumes_identically(run, shards, tmp_path):
    settings = tiny_run(shards, tmp_path / "run", LLAMA)
    train(settings)
    assert pretrain(settings, resume="10", console=Console(file=io.StringIO())) == "finished"
    assert trajectory(tmp_path / "run") == trajectory(run[0])


def test_bf16_trains_under_zero(shards, tmp_path):
    train(tiny_run(shards, tmp_path / "run", LLAMA, "train.precision=bf16", "train.zero_stage=3"))
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.3


def test_another_kind_is_another_run(run, shards):
    with pytest.raises(ConfigError, match=r"model\.kind: was llama, now tnl"):
        train(tiny_run(shards, run[0]))


def test_the_export_is_a_plain_llama(run, exported, shards):
    config = json.loads((exported / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "auto_map" not in config
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    assert type(model) is LlamaForCausalLM
    heldout = ShardSet.open(shards, "heldout")
    window = {"device": torch.device("cpu"), "length": 4096, "window": 32}
    result = heldout_loss(LlamaBaseline.from_pretrained(exported), heldout, **window)
    (row,) = rows(run[0], "evaluation")
    assert result.loss == pytest.approx(row["loss"], rel=1e-5)


def test_evaluate_uses_windows_as_long_as_in_training(tnl_command, run, shards, tmp_path):
    file = tmp_path / "figures.json"
    code, out, _ = tnl_command("evaluate", run[0], "--data", shards, "--json", file)
    assert code == 0
    assert "windows of 32 tokens" in out
    (row,) = rows(run[0], "evaluation")
    assert json.loads(file.read_text())["loss"] == pytest.approx(row["loss"], rel=1e-5)


@pytest.mark.parametrize("options", [[], ["--num-beams", 2]], ids=["sampled", "beams"])
def test_generate_continues_a_prompt(tnl_command, exported, options):
    prompt = ["--prompt", "def self", "--temperature", "0", "--max-new-tokens", "6", *options]
    code, out, err = tnl_command("generate", exported, *prompt)
    assert code == 0, err
    assert out.startswith("def self")
    assert len(out) > len("def self\n")
    assert "whose cache grows" in err


def test_a_state_is_refused(tnl_command, exported, tmp_path):
    code, _, err = tnl_command("generate", exported, "--prompt", "x y", "--save-state", tmp_path / "s.safetensors")
    assert code == 2
    assert "a LLaMA has no state of constant size" in err
    code, _, err = tnl_command("chat", exported)
    assert code == 2
    assert "model_type 'llama', expected transnormer" in err


def test_an_export_that_lacks_a_weight_is_refused(tnl_command, exported, shards, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code, _, err = tnl_command("evaluate", folder, "--data", shards)
    assert code == 2
    assert "missing: model.layers.0.mlp.up_proj.weight" in err


def test_a_run_folder_resolves_to_its_export(run):
    assert isinstance(AutoModelForCausalLM.from_pretrained(resolve_model(str(run[0]))), LlamaForCausalLM)


def test_a_width_without_a_llama_is_refused_by_the_configuration(shards, tmp_path):
    with pytest.raises(ConfigError, match="hidden_size: 30 does not divide into 2 heads of an even size"):
        tiny_run(shards, tmp_path, LLAMA, "model.hidden_size=30")
