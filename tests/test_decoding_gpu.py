"""`generate()` on a GPU: the CUDA graph of a step gives what single kernels give, for each generation by itself."""

import threading

import pytest
import torch

from tests.closeness import assert_close
from tests.tiny_model import random_ids, tiny_model
from tnl.model import TransnormerState
from tnl.model.decoding import StepGraph

pytestmark = pytest.mark.gpu
LENGTHS = (3, 1, 70, 12)


@pytest.fixture(scope="module")
def model():
    return tiny_model(linear_use_lrpe_list=[1, 0]).cuda()


@pytest.fixture(scope="module")
def batch():
    """Prompts of unequal length padded on the left, and their mask."""
    ids, mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64), torch.zeros(len(LENGTHS), max(LENGTHS))
    for row, length in enumerate(LENGTHS):
        ids[row, -length:], mask[row, -length:] = random_ids(1, length, seed=length)[0], 1
    return ids.cuda(), mask.long().cuda()


def generate(model, ids, mask=None, seed=None, **options):
    """New tokens [B, N] and scores [B, N, vocabulary]; sampled with a seed, greedy without."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = dict(max_new_tokens=20, do_sample=seed is not None, top_k=0, pad_token_id=0) | options
    with torch.random.fork_rng(devices=[0]):
        torch.manual_seed(seed or 0)
        output = model.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **options
        )  # fmt: skip
    return output.sequences[:, ids.shape[1] :], torch.stack(output.scores, 1)


@pytest.fixture
def replays(monkeypatch):
    """The number of graphs that were replayed so far, as a list of one."""
    count, replay = [0], torch.cuda.CUDAGraph.replay

    def counted(graph):
        count[0] += 1
        return replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return count


@pytest.mark.parametrize("seed", [None, 5])
def test_the_graph_gives_what_single_kernels_give(model, batch, seed, replays):
    tokens, scores = generate(model, *batch, seed=seed)
    assert replays[0] == 18  # of 20 tokens the first is the prompt's, the second sets up
    expected, expected_scores = generate(model, *batch, seed=seed, disable_compile=True)
    assert replays[0] == 18
    assert torch.equal(tokens, expected)
    assert_close("scores", scores, expected_scores)


def test_a_batch_gives_what_each_prompt_gives_alone(model, batch):
    tokens, _ = generate(model, *batch)
    for row, length in enumerate(LENGTHS):
        alone, _ = generate(model, batch[0][row : row + 1, -length:])
        assert torch.equal(tokens[row], alone[0])


def test_the_gpu_gives_what_the_cpu_gives(model, batch):
    tokens, scores = generate(model, *batch)
    expected, expected_scores = generate(tiny_model(linear_use_lrpe_list=[1, 0]), *(x.cpu() for x in batch))
    assert torch.equal(tokens.cpu(), expected)
    assert_close("scores", scores.cpu(), expected_scores, 1e-4)


def test_a_chunk_of_one_column_with_padding_is_not_taken_for_a_step(model, replays):
    ids = random_ids(2, 9).cuda()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    tokens, _ = generate(model, ids, mask, prefill_chunk_size=4)
    alone, _ = generate(model, ids[:1, :5])
    assert torch.equal(tokens[0], alone[0])


def test_interleaved_steps_do_not_touch_each_other(model):
    with torch.no_grad():
        states, steps, seen = [], [], [[], []]
        for seed in (1, 2):
            states.append(model(random_ids(1, 7, seed=seed).cuda()).past_key_values)
            steps.append(StepGraph(model))
        tokens = [random_ids(1, 12, seed=seed).cuda() for seed in (3, 4)]
        for t in range(12):
            for i in (0, 1):
                seen[i].append(steps[i](tokens[i][:, t : t + 1], past_key_values=states[i]).logits.clone())
        for i, seed in enumerate((1, 2)):
            whole = torch.cat([random_ids(1, 7, seed=seed).cuda(), tokens[i]], 1)
            output = model(whole)
            assert_close("logits", torch.cat(seen[i], 1), output.logits[:, 7:])
            assert states[i].positions.tolist() == [19]
            for layer, expected in zip(states[i].layers, output.past_key_values.layers, strict=True):
                assert_close("state", layer, expected)


def test_two_threads_generate_at_once(model):
    prompts = [random_ids(1, 40, seed=seed).cuda() for seed in (1, 2)]
    expected = [model.generate(p, max_new_tokens=60, do_sample=False) for p in prompts]
    actual = [None, None]

    def run(i):
        actual[i] = model.generate(prompts[i], max_new_tokens=60, do_sample=False)

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_a_second_turn_continues_from_the_state_of_the_first(model):
    options = dict(max_new_tokens=9, do_sample=False)
    state = TransnormerState()
    first = model.generate(random_ids(1, 12).cuda(), past_key_values=state, **options)
    prompt = torch.cat([first, random_ids(1, 6, seed=9).cuda()], 1)
    expected = model.generate(prompt, **options)
    assert state.length == first.shape[1] - 1
    assert torch.equal(model.generate(prompt, past_key_values=state, **options), expected)
    assert state.positions.tolist() == [expected.shape[1] - 1]


def test_beams_and_hidden_states_go_without_the_graph(model, replays):
    ids = random_ids(1, 12).cuda()
    beams = model.generate(ids, num_beams=4, max_new_tokens=6, do_sample=False)
    assert torch.equal(beams, model.generate(ids, num_beams=4, max_new_tokens=6, do_sample=False, use_cache=False))
    output = model.generate(ids, max_new_tokens=6, return_dict_in_generate=True, output_hidden_states=True)
    assert len(output.hidden_states) == 6
    assert replays[0] == 0


def test_memory_does_not_grow_with_the_tokens(model):
    with torch.no_grad():
        state, ids, allocated = TransnormerState(), random_ids(4, 1).cuda(), []
        model(ids, past_key_values=state)
        step = StepGraph(model)
        for i in range(400):
            ids = step(ids, past_key_values=state).logits[:, -1].argmax(-1, keepdim=True)
            if i in (5, 399):
                allocated.append(torch.cuda.memory_allocated())
    assert allocated[0] == allocated[1]


def test_no_graph_outlives_its_generation(model):
    ids = random_ids(2, 12).cuda()
    model.generate(ids, max_new_tokens=6, do_sample=False)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.cuda.memory_allocated() == before


def test_adapted_weights_go_through_the_graph(batch, replays):
    peft = pytest.importorskip("peft")
    from tnl.model.adapters import lora_config

    network = tiny_model().cuda()
    adapted = peft.get_peft_model(network, lora_config(network.config, r=4, init_lora_weights=False)).eval()
    tokens, scores = generate(adapted, *batch)
    assert replays[0] == 18
    expected, expected_scores = generate(adapted, *batch, disable_compile=True)
    assert torch.equal(tokens, expected)
    assert_close("scores", scores, expected_scores)


def test_quantised_weights_go_through_the_graph(tmp_path, replays):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    tiny_model(decoder_embed_dim=128, glu_dim=256).save_pretrained(tmp_path)
    method = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=method, device_map="cuda"
    )
    ids = random_ids(2, 12).cuda()
    tokens, _ = generate(quantised, ids)
    assert replays[0] == 18
    assert torch.equal(tokens, generate(quantised, ids, disable_compile=True)[0])
