"""Two ranks share the requests, read less each, and both end with all results in lm-eval's order."""

import json

import pytest
import torch
import torch.distributed as dist

from tests.harness_requests import assert_same_scores, multiple_choice, requests
from tests.tiny_model import tiny_model
from tests.tiny_tokenizers import released_tokenizer
from tests.tiny_tokenizers import tiny_model as tiny_sentencepiece
from tests.warm_process import CONTEXT
from tnl.errors import NonFiniteError
from tnl.evaluation.harness_model import HarnessModel
from tnl.evaluation.sample_cache import SampleCache

CHOICES = multiple_choice(4, 6, 40, 5, (" self", " value of", " return"))
TEXTS = requests("loglikelihood_rolling", [("the state of",), ("def value ( self )",), ("",), ("12",)])
SAMPLED = {"max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
PROMPTS = requests("generate_until", [("the", {"max_gen_toks": 6}), ("the", SAMPLED), ("self", SAMPLED)])


def answers(ours: HarnessModel) -> list:
    return [
        ours.loglikelihood(CHOICES, disable_tqdm=True),
        ours.loglikelihood_rolling(TEXTS, disable_tqdm=True),
        ours.generate_until(PROMPTS, disable_tqdm=True),
        ours.loglikelihood(CHOICES[:1], disable_tqdm=True),  # nothing is left for one of the ranks
    ]


def rank_main(rank: int, folder, tokenizer) -> None:
    """Write what this rank was answered, what it read, and the error of a model that is wrong on rank 1 only."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = tiny_model(vocab_size=400)
    ours = HarnessModel(model, tokenizer, cache=SampleCache(folder / "cache"))
    found = {"answers": answers(ours), "tokens_read": ours.counts.tokens_read, "requests": ours.counts.requests}
    if rank == 1:
        with torch.no_grad():
            model.lm_head.weight[:] = float("nan")
    try:
        HarnessModel(model, tokenizer).loglikelihood(CHOICES, disable_tqdm=True)
    except NonFiniteError as error:
        found["error"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_both_ranks_have_the_answers_of_one_process(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(released_tokenizer(tmp_path / "tokenizer", tiny_sentencepiece()))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    # Not forks of this process, which may have a group of its own and threads.
    start = CONTEXT.get_start_method()
    torch.multiprocessing.start_processes(rank_main, (tmp_path, tokenizer), nprocs=2, start_method=start)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    alone = HarnessModel(tiny_model(vocab_size=400), tokenizer)
    expected = answers(alone)
    for rank in found:
        assert_same_scores(rank["answers"][0], expected[0])
        assert rank["answers"][1] == pytest.approx(expected[1], abs=1e-4)
        assert rank["answers"][2] == expected[2]
        assert_same_scores(rank["answers"][3], expected[3])
        assert rank["requests"] == alone.counts.requests
        assert rank["tokens_read"] < 0.65 * alone.counts.tokens_read
        assert "its log-likelihood is nan" in rank["error"]
    # What each of them computed continues in one process.
    resumed = HarnessModel(tiny_model(vocab_size=400), tokenizer, cache=SampleCache(tmp_path / "cache"))
    assert answers(resumed) == [[tuple(x) if isinstance(x, list) else x for x in part] for part in found[0]["answers"]]
    assert resumed.counts.tokens_read == 0
