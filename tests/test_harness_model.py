"""`HarnessModel` gives what lm-eval's own ``hf`` adapter gives, and one forward pass beyond that one's limit."""

import json
import random

import lm_eval
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from tests.harness_requests import assert_same_scores, multiple_choice, requests, words
from tests.tiny_corpus import tiny_shards
from tests.tiny_model import tiny_model
from tests.tiny_tokenizers import PARTS
from tnl.data.shards import TOKENIZER_FILE
from tnl.data.tokenizer_export import export_tokenizer
from tnl.errors import ConfigError, UserError
from tnl.evaluation.harness_model import HarnessModel

CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant:{% endif %}"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The tokenizer of a few shards, without and with a token at the beginning of every text."""
    folder, found = tmp_path_factory.mktemp("tokenizer"), {}
    shards = tiny_shards(folder)
    for add_bos in (False, True):
        (folder / str(add_bos)).mkdir()
        export_tokenizer(shards / TOKENIZER_FILE, folder / str(add_bos), add_bos=add_bos)
        found[add_bos] = AutoTokenizer.from_pretrained(folder / str(add_bos))
        found[add_bos].chat_template = CHAT
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["no bos", "bos"])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=340)


def hf(model, tokenizer, **options) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", **options)


def choice_requests():
    """Choices of one token and of several, some a beginning of others, with and without contexts that they share."""
    choices = (" self", " value", " value =", " return 12 345 state", " return 12")
    found = multiple_choice(2, 5, 30, 6, choices) + multiple_choice(1, 9, 0, 4, choices[:2])
    pairs = [("", " the state"), ("", "self"), ("the ", "state"), ("a\n\n", " b"), ("self", "self"), ("  ", "value")]
    pairs += [("<s>def", " value"), ("", "<s>def")]
    return found + requests("loglikelihood", [*pairs, *pairs[:2]])


# Texts to tokens


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=6), st.lists(st.sampled_from(PARTS), min_size=1, max_size=4))
@pytest.mark.parametrize("add_bos", [False, True], ids=["no bos", "bos"])
def test_pairs_are_tokenized_as_by_hf(model, tokenizers, add_bos, context, continuation):
    context, continuation = "".join(context), "".join(continuation)
    theirs, ours = hf(model, tokenizers[add_bos]), HarnessModel(model, tokenizers[add_bos])
    assert ours.tok_encode(context) == theirs.tok_encode(context)
    if context.strip():
        (found,) = ours._tokens.encode_pairs([(context, continuation)], ["a request"])
        assert [ids.tolist() for ids in found] == list(theirs._encode_pair(context, continuation))


def test_chat_templates_are_rendered_as_by_hf(model, tokenizer):
    theirs, ours = hf(model, tokenizer), HarnessModel(model, tokenizer)
    history = [{"role": "user", "content": "value?"}, {"role": "assistant", "content": "12"}]
    for prompt in (True, False):
        text = ours.apply_chat_template(history, add_generation_prompt=prompt)
        assert text == theirs.apply_chat_template(history, add_generation_prompt=prompt)
    assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.chat_template(True) == theirs.chat_template(True) == CHAT
    assert ours.tokenizer_name == theirs.tokenizer_name


def test_special_tokens_of_a_chat_template_can_be_tokens(model, tokenizers):
    ours = HarnessModel(model, tokenizers[False], split_special_tokens=False)
    assert ours.tok_encode("<s>user").count(tokenizers[False].bos_token_id) == 1
    assert tokenizers[False].bos_token_id not in HarnessModel(model, tokenizers[False]).tok_encode("<s>user")


# Scores


@pytest.fixture(scope="module")
def expected_scores(model, tokenizer):
    # Its adapter has no answer where the context is nothing but spaces.
    asked = [request for request in choice_requests() if request.args[0] != "  "]
    return hf(model, tokenizer, batch_size=8).loglikelihood(asked, disable_tqdm=True)


@pytest.mark.parametrize("batch_tokens", [16, 100, 2**14])
def test_scores_equal_hf(model, tokenizer, expected_scores, batch_tokens):
    asked = [request for request in choice_requests() if request.args[0] != "  "]
    ours = HarnessModel(model, tokenizer, batch_tokens=batch_tokens)
    assert_same_scores(ours.loglikelihood(asked, disable_tqdm=True), expected_scores)
    assert ours.counts.requests == len(asked)
    assert ours.counts.truncations == 0


def test_a_request_alone_has_the_score_that_it_has_among_others(model, tokenizer):
    asked = choice_requests()
    ours = HarnessModel(model, tokenizer)
    together = ours.loglikelihood(asked, disable_tqdm=True)
    assert_same_scores([ours.loglikelihood([one], disable_tqdm=True)[0] for one in asked[::7]], together[::7])


@pytest.mark.parametrize("changes", [{"gate_dim": 4}, {"linear_use_lrpe_list": []}], ids=str)
def test_scores_of_other_architectures_equal_hf(tokenizers, changes):
    other, asked = tiny_model(vocab_size=340, **changes), choice_requests()[:50]
    expected = hf(other, tokenizers[False], batch_size=8).loglikelihood(asked, disable_tqdm=True)
    assert_same_scores(HarnessModel(other, tokenizers[False]).loglikelihood(asked, disable_tqdm=True), expected)


def test_greedy_continuations_are_greedy(model, tokenizers):
    tokenizer, ids = tokenizers[False], tokenizers[False]("the state of")["input_ids"]
    made = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    ours = HarnessModel(model, tokenizer)
    other = [*made[:-1], (made[-1] + 1) % 340]
    scores = ours._loglikelihood_tokens([(None, ids, made), (None, ids, other), (None, ids, made[:3])], True)
    assert [greedy for _, greedy in scores] == [True, False, True]


def test_beyond_the_limit_of_hf_scores_are_those_of_one_forward_pass(model, tokenizers):
    # The tokenizer says nothing and the model has no limit: lm-eval then takes 2048.
    tokenizer, text = tokenizers[False], words(random.Random(1), 3000)
    context, continuation = text, " return self value"
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    num_scored = ids.shape[1] - len(tokenizer(context)["input_ids"])
    assert ids.shape[1] > hf(model, tokenizer).max_length == 2048
    with torch.no_grad():
        scores = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).double()
    ours = HarnessModel(model, tokenizer, batch_tokens=500)
    ((score, _),) = ours.loglikelihood(requests("loglikelihood", [(context, continuation)]), disable_tqdm=True)
    assert score == pytest.approx(scores[-num_scored:].sum().item(), abs=1e-4)
    assert ours.counts.truncations == 0


def test_a_limit_cuts_as_hf_does_and_is_counted(model, tokenizers):
    asked = choice_requests()[:50]
    expected = hf(model, tokenizers[False], max_length=20, batch_size=4).loglikelihood(asked, disable_tqdm=True)
    ours = HarnessModel(model, tokenizers[False], max_length=20)
    assert_same_scores(ours.loglikelihood(asked, disable_tqdm=True), expected)
    assert ours.counts.truncations == 50


def test_rolling_scores_equal_hf(model, tokenizer):
    draw = random.Random(2)
    asked = requests("loglikelihood_rolling", [(words(draw, count),) for count in (1, 40, 3, 60)] + [("",)])
    expected = hf(model, tokenizer, batch_size=2).loglikelihood_rolling(asked, disable_tqdm=True)
    for batch_tokens in (7, 2**14):
        ours = HarnessModel(model, tokenizer, batch_tokens=batch_tokens)
        scores = ours.loglikelihood_rolling(asked, disable_tqdm=True)
        assert scores == pytest.approx(expected, abs=1e-4, rel=3e-7)  # theirs is a sum in fp32
    windows = hf(model, tokenizer, batch_size=2, max_length=16).loglikelihood_rolling(asked, disable_tqdm=True)
    scores = HarnessModel(model, tokenizer, max_length=16).loglikelihood_rolling(asked, disable_tqdm=True)
    assert scores == pytest.approx(windows, abs=1e-4, rel=3e-7)


def test_rolling_over_a_long_text_is_one_forward_pass_in_pieces(model, tokenizers, widths):
    tokenizer, text = tokenizers[False], words(random.Random(3), 2500)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        scores = model(ids[:, :-1]).logits.log_softmax(-1)[0].gather(1, ids[0, 1:, None]).double()
    del widths[:]
    (score,) = HarnessModel(model, tokenizer, batch_tokens=512).loglikelihood_rolling(
        requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True
    )
    assert score == pytest.approx(scores.sum().item(), rel=1e-7)
    assert max(widths) == 512
    assert sum(widths) == ids.shape[1] - 1


@pytest.fixture
def widths(model):
    """Tokens of every forward pass."""
    seen = []
    handle = model.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    yield seen
    handle.remove()


# Texts


def generation_requests():
    draw = random.Random(4)
    shots, arguments = words(draw, 40), {"until": ["\n", " of"], "max_gen_toks": 12}
    contexts = [f"{shots} {words(draw, 5)}" for _ in range(6)] + [words(draw, n) for n in (1, 9)]
    asked = [(context, arguments) for context in contexts]
    return requests("generate_until", [*asked, *[(context, {"max_gen_toks": 3}) for context in contexts[:3]], asked[0]])


@pytest.mark.parametrize("max_state_bytes", [1, 2**32], ids=["one state", "all states"])
def test_generations_equal_hf(model, tokenizer, max_state_bytes):
    asked = generation_requests()
    expected = hf(model, tokenizer, batch_size=1).generate_until(asked, disable_tqdm=True)
    assert any(" of" not in text and text for text in expected)
    ours = HarnessModel(model, tokenizer, max_state_bytes=max_state_bytes)
    assert ours.generate_until(asked, disable_tqdm=True) == expected
    assert ours.counts.empty_outputs == sum(not text.strip() for text in expected)
    assert ours.counts.tokens_reused > 4 * 40


@pytest.mark.parametrize("shares", [True, False])
def test_no_pass_of_a_generation_reads_more_than_a_batch(model, tokenizers, widths, shares):
    arguments = {"max_gen_toks": 4} if shares else {"max_gen_toks": 4, "repetition_penalty": 1.2}
    asked = requests("generate_until", [(f"{'the state of ' * 20}{i}", arguments) for i in range(40)])
    expected = HarnessModel(model, tokenizers[False]).generate_until(asked, disable_tqdm=True)
    del widths[:]
    ours = HarnessModel(model, tokenizers[False], batch_tokens=16)
    assert ours.generate_until(asked, disable_tqdm=True) == expected
    assert max(widths) == 16


def test_a_text_to_stop_at_ends_a_row_where_it_first_stands(model, tokenizers):
    tokenizer, context = tokenizers[False], "the state of"
    ours = HarnessModel(model, tokenizer)

    def generate(until):
        asked = requests("generate_until", [(context, {"until": until, "max_gen_toks": 30})])
        return ours.generate_until(asked, disable_tqdm=True)[0]

    whole = generate([])
    before = ours.counts.tokens_generated
    stop = whole[4:7]
    assert generate([stop]) == whole[: whole.index(stop)]
    assert ours.counts.tokens_generated - before < 30


def test_an_end_token_of_the_tokenizer_ends_a_row(model, tokenizers):
    tokenizer = tokenizers[False]
    context = "the state of"
    ids = tokenizer(context)["input_ids"]
    made = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    texts = [tokenizer.decode([i]) for i in made]
    end = next(i for i in range(1, 8) if "\ufffd" not in texts[i] and texts[i] not in tokenizer.decode(made[:i]))
    eos, tokenizer.eos_token_id = tokenizer.eos_token_id, made[end]
    try:
        asked = requests("generate_until", [(context, {"max_gen_toks": 8}), ("12 345", {"max_gen_toks": 8})])
        expected = hf(model, tokenizer, batch_size=1).generate_until(asked, disable_tqdm=True)
        ours = HarnessModel(model, tokenizer)
        assert ours.generate_until(asked, disable_tqdm=True) == expected
    finally:
        tokenizer.eos_token_id = eos
    assert ours.counts.tokens_generated <= end + 8


def test_samples_do_not_depend_on_the_batch_and_differ_when_repeated(model, tokenizers):
    arguments = {"max_gen_toks": 10, "do_sample": True, "temperature": 1.0}
    asked = requests("generate_until", [(context, arguments) for context in ("the", "def value", "the", "state")])
    ours = HarnessModel(model, tokenizers[False])
    together = ours.generate_until(asked, disable_tqdm=True)
    assert together[0] != together[2]
    assert [ours.generate_until([one], disable_tqdm=True)[0] for one in asked[:2]] == together[:2]


def test_samples_follow_the_distribution(model, tokenizers):
    tokenizer, count = tokenizers[False], 1000
    ids = tokenizer("the state")["input_ids"]
    with torch.no_grad():
        probability = (model(torch.tensor([ids])).logits[0, -1] / 3).softmax(-1)
    best = probability.argmax().item()
    arguments = {"max_gen_toks": 1, "do_sample": True, "temperature": 3.0, "top_k": 0}
    asked = requests("generate_until", [("the state", arguments)] * count)
    texts = HarnessModel(model, tokenizer).generate_until(asked, disable_tqdm=True)
    share = sum(text == tokenizer.decode([best], skip_special_tokens=True) for text in texts) / count
    p = probability[best].item()
    assert abs(share - p) < 4 * (p * (1 - p) / count) ** 0.5


def test_a_limit_leaves_room_for_new_tokens_as_in_hf(model, tokenizers):
    asked = generation_requests()[:4]
    expected = hf(model, tokenizers[False], max_length=30, batch_size=1).generate_until(asked, disable_tqdm=True)
    ours = HarnessModel(model, tokenizers[False], max_length=30)
    assert ours.generate_until(asked, disable_tqdm=True) == expected
    assert ours.counts.truncations == 4


# A whole evaluation


def test_an_evaluation_of_lm_eval_gives_the_same_numbers(model, tokenizers, tmp_path):
    records = [{"text": f"def value {i} =", "choices": ["self", "state of", "12"], "answer": i % 3} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
    }
    tasks = [
        common
        | {
            "task": "choices",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "num_fewshot": 2,
            "fewshot_split": "test",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        common
        | {
            "task": "rolling",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        common
        | {
            "task": "texts",
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]
    manager, results = TaskManager(include_defaults=False), []
    ours = HarnessModel(model, tokenizers[False])
    for lm in (hf(model, tokenizers[False]), ours):
        found = lm_eval.evaluate(lm, manager.load(tasks), bootstrap_iters=0)["results"]
        results.append({(task, name): x for task, row in found.items() for name, x in row.items() if name != "alias"})
    numbers, expected = (
        {name: x for name, x in found.items() if not isinstance(x, str)} for found in reversed(results)
    )
    assert {"choices", "rolling", "texts"} == {task for task, _ in numbers}
    assert numbers == pytest.approx(expected, rel=1e-6)
    assert ours.counts.requests == 8 * 3 + 8 + 8


@pytest.mark.gpu
@pytest.mark.parametrize("max_state_bytes", [1, 2**32], ids=["one state", "all states"])
def test_on_a_gpu_scores_and_texts_equal_hf(tokenizers, max_state_bytes):
    on_gpu = tiny_model(vocab_size=340).cuda()
    theirs = HFLM(pretrained=on_gpu, tokenizer=tokenizers[False], device="cuda", batch_size=1)
    ours = HarnessModel(on_gpu, tokenizers[False], batch_tokens=100, max_state_bytes=max_state_bytes)
    asked, prompts = choice_requests()[:50], generation_requests()
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    scores = ours.loglikelihood(asked, disable_tqdm=True)
    # Other shapes of a matmul round in another way.
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert ours.generate_until(prompts, True) == theirs.generate_until(prompts, True)


# What is refused


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("loglikelihood", ("the state", ""), "tiny, document 0, request 0: the continuation '' has no tokens"),
        ("loglikelihood", ("the", " of" * 30), "continuation has .* max_length is 20"),
        ("generate_until", ("", {}), "its context has no tokens"),
        ("generate_until", ("the", {"max_gen_toks": 0}), "asks for 0 new tokens"),
        ("generate_until", ("the", {"max_gen_toks": 20}), "asks for 20 new tokens, max_length is 20"),
        ("generate_until", ("the", {"do_sample": True, "temperature": 0.0}), "temperature of 0"),
        ("generate_until", ("the", {"num_beams": 4}), "its generation_kwargs have num_beams, not supported here"),
        ("generate_until", ("the", {"stop": "x", "typical_p": 0.5}), "its generation_kwargs have stop, typical_p, not"),
    ],
)
def test_a_request_without_an_answer_is_named(model, tokenizers, kind, arguments, message):
    ours = HarnessModel(model, tokenizers[False], max_length=20)
    with pytest.raises(UserError, match=message):
        getattr(ours, kind)(requests(kind, [arguments]), disable_tqdm=True)


def test_another_kind_of_model_is_refused(tokenizers):
    with pytest.raises(ConfigError, match="Linear: expected a TransnormerForCausalLM"):
        HarnessModel(torch.nn.Linear(2, 2), tokenizers[False])


def test_partitioned_weights_are_refused(tokenizers):
    partitioned = tiny_model(vocab_size=340)
    for parameter in partitioned.parameters():
        parameter.ds_id = 0
    with pytest.raises(ConfigError, match=r"partitioned by ZeRO-3.*evaluate a saved checkpoint"):
        HarnessModel(partitioned, tokenizers[False])


def test_a_tokenizer_of_another_model_is_refused(tokenizers):
    with pytest.raises(ConfigError, match=r"ids go up to 339, the model's vocab_size is 61; give the model's own"):
        HarnessModel(tiny_model(), tokenizers[False])
