"""`tnl evaluate --suite` and `--tasks`: offline, from small files, what is wrong refused, a killed one continued."""

import json
import math
import os
import signal

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import tnl  # noqa: F401 -- teaches transformers the model
from tests.task_files import COUNT, write_rows, write_tasks
from tests.tiny_folder import tiny_folder
from tests.tiny_tokenizers import released_tokenizer
from tests.tiny_tokenizers import tiny_model as tiny_sentencepiece
from tests.warm_process import CONTEXT
from tnl.errors import EXIT_DATA, EXIT_NON_FINITE, EXIT_USAGE, ConfigError
from tnl.evaluation import harness_model
from tnl.evaluation.empty_answers import EmptyAnswers, empty_answers
from tnl.evaluation.sample_cache import SampleCache
from tnl.evaluation.suite_command import SuiteOptions, evaluate_suite, load_suite
from tnl.evaluation.suite_run import SEEDS, Wanted, plan
from tnl.evaluation.task_data import TaskData
from tnl.evaluation.task_library import TaskLibrary

MEASURED = ["boolq", "piqa", "hellaswag", "arc_easy", "mmlu_anatomy", "wikitext", "lambada_openai"]
SUITE = """
title: Seven tasks
tasks:
  - {task: boolq, column: BoolQ, metric: acc}
  - {task: piqa, column: PIQA, metric: acc}
  - {task: hellaswag, column: HellaSwag, metric: acc_norm}
  - {task: arc_easy, column: ARC-e, metric: acc}
  - {task: winogrande, column: WinoGrande, metric: acc}
  - {task: mmlu, column: MMLU, metric: acc, num_fewshot: 3}
  - {task: wikitext, column: Token ppl, metric: token_perplexity, unit: raw}
  - {task: lambada_openai, column: LAMBADA, metric: perplexity, unit: raw}
averages: [{column: Mean, of: [BoolQ, PIQA]}]
published: [{model: other, parameters: 1B, source: a paper, scores: {BoolQ: 61.25}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, the data of seven tasks, and a suite that wants eight."""
    found = tmp_path_factory.mktemp("evaluate")
    tiny_folder(found)
    write_tasks(found / "tasks")
    (found / "seven.yaml").write_text(SUITE)
    return found


@pytest.fixture(scope="module")
def measured(folder):
    """The report of the suite, as JSON, and what was said at the end."""
    options = SuiteOptions(str(folder / "seven.yaml"), (), folder / "out", data_dir=folder / "tasks")
    lines = []
    with pytest.raises(ValueError, match="2 of 8 tasks were not measured, or not whole") as error:
        evaluate_suite(str(folder / "model"), options, report=lines.append)
    return json.loads((folder / "out/scores.json").read_text()), str(error.value), "\n".join(lines)


def scores_of(found: dict) -> dict:
    return {(s["task"], s["metric"]): (s["value"], s["stderr"]) for s in found["details"]}


def test_scores_are_those_of_lm_eval_and_its_own_adapter(folder, measured):
    model, tokenizer = (kind.from_pretrained(folder / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    wanted = [Wanted(name, 3 if name == "mmlu_anatomy" else 0) for name in MEASURED]
    tasks = plan(TaskLibrary(TaskData(folder / "tasks")), wanted, confirm_unsafe=False).tasks
    for task in tasks.values():
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
    theirs = lm_eval.evaluate(HFLM(model, tokenizer=tokenizer, device="cpu"), {"tasks": tasks}, bootstrap_iters=0)
    ours = {key: value for key, (value, _) in scores_of(measured[0]).items()}
    for name in MEASURED:
        metrics = {k.partition(",")[0]: v for k, v in theirs["results"][name].items() if k.endswith(",none")}
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                assert ours[name, metric] == pytest.approx(value, rel=1e-5), (name, metric)
    assert theirs["n-shot"]["mmlu_anatomy"] == 3


def test_the_report_has_ours_and_the_published(measured, folder):
    found, _, shown = measured
    table = found["tables"][0]
    ours, other = table["rows"]
    assert table["columns"][-1] == "Mean"
    assert ours["cells"]["Mean"]["value"] == (ours["cells"]["BoolQ"]["value"] + ours["cells"]["PIQA"]["value"]) / 2
    assert ours["cells"]["MMLU"]["note"] == "of 1 of 57 tasks only"
    assert "WinoGrande" not in ours["cells"]
    assert other["cells"]["BoolQ"]["value"] == 61.25
    for name in ("report.md", "index.html"):
        assert "61.25" in (folder / "out" / name).read_text()
    assert "61.25" in shown


def test_what_scores_depend_on_is_saved(measured):
    found, _, _ = measured
    assert found["versions"]["lm_eval"] == lm_eval.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert {score["version"] for score in found["details"]} >= {"1.0", "2.0"}
    assert found["seeds"] == SEEDS
    assert len(found["model"]["weights_sha256"]) == 64
    assert found["model"]["counts"]["requests"] > 0
    assert found["model"]["counts"]["truncations"] == 0
    assert set(found["data"]) == set(MEASURED)


def test_every_prompt_is_saved_with_its_answer(folder, measured):
    lines = [json.loads(line) for line in (folder / "out/prompts/mmlu_anatomy.jsonl").read_text().splitlines()]
    assert len(lines) == COUNT
    for line in lines:
        assert line["context"].count("Answer:") == 4
        assert line["continuations"] == [" A", " B", " C", " D"]
        assert len(line["answers"]) == 4
    accuracy = sum(line["scores"]["acc"] for line in lines) / COUNT
    assert accuracy == scores_of(measured[0])["mmlu_anatomy", "acc"][0]


def test_losses_per_token_word_and_byte_are_of_one_sum(folder, measured):
    losses = {loss["unit"]: loss for loss in measured[0]["losses"] if loss["task"] == "wikitext"}
    sums = [losses[unit]["nats"] * losses[unit]["count"] for unit in ("token", "word", "byte")]
    assert sums == pytest.approx([sums[0]] * 3)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = [json.loads(line)["page"] for line in (folder / "tasks/wikitext/test.jsonl").read_text().splitlines()]
    assert losses["byte"]["count"] == sum(len(text.encode()) for text in texts)
    # The task scores another spelling than it counts the bytes of.
    scored = [wikitext_detokenizer({"page": text}) for text in texts]
    assert losses["token"]["count"] == sum(len(tokenizer(text)["input_ids"]) for text in scored)
    assert losses["token"]["bits"] == pytest.approx(losses["token"]["nats"] / math.log(2))
    word = scores_of(measured[0])["wikitext", "word_perplexity"][0]
    assert losses["word"]["perplexity"] == pytest.approx(word)


def test_missing_data_are_named_with_the_command_that_fetches_them(measured):
    found, message, shown = measured
    assert set(found["missing"]) == {"winogrande", "mmlu"}
    assert "56 of its 57 tasks have no data (mmlu_abstract_algebra, " in message
    for command in ("tnl data fetch winogrande", "tnl data fetch mmlu"):
        assert command in message
        assert command in shown


# The command


def test_the_command_ends_with_a_code_that_says_that_data_are_missing(folder, tnl_command, tmp_path):
    arguments = ["evaluate", folder / "model", "--tasks", "boolq,mmlu", "--data-dir", folder / "tasks"]
    code, out, err = tnl_command(*arguments, "--limit", "2", "--few-shot", "0", "--output", tmp_path)
    assert code == EXIT_DATA
    assert "error: 1 of 2 tasks were not measured" in err
    assert "the first 2 documents of each task" in out
    assert "of 1 of 57 tasks only" in out
    found = json.loads((tmp_path / "scores.json").read_text())["details"]
    assert [(score["task"], score["num_documents"]) for score in found] == [("boolq", 2), ("mmlu_anatomy", 2)]


def test_a_group_of_which_no_mean_makes_sense_stands_for_its_tasks(folder, tnl_command, tmp_path):
    write_rows(tmp_path / "tasks/cola/validation.jsonl", [{"sentence": f"s {i}", "label": i % 2} for i in range(4)])
    pairs = [{"sentence1": f"s {i}", "sentence2": "t", "label": i % 2} for i in range(4)]
    write_rows(tmp_path / "tasks/mrpc/validation.jsonl", pairs)
    options = ["--tasks", "glue", "--data-dir", tmp_path / "tasks", "--output", tmp_path / "out"]
    code, out, _ = tnl_command("evaluate", folder / "model", *options)
    assert code == EXIT_DATA
    found = json.loads((tmp_path / "out/scores.json").read_text())["scores"]["glue"]
    assert [(score["task"], score["metric"]) for score in found] == [("cola", "mcc"), ("mrpc", "acc"), ("mrpc", "f1")]
    assert "mcc" in out


def test_a_limit_of_length_is_counted(folder, tnl_command, tmp_path):
    options = ["--data-dir", folder / "tasks", "--max-length", "30", "--batch-tokens", "64", "--output", tmp_path]
    assert tnl_command("evaluate", folder / "model", "--tasks", "boolq", *options)[0] == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["model"]["counts"]["truncations"] == 2 * COUNT
    assert "truncations 12" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --data for held-out loss, or --suite or --tasks for benchmarks"),
        (["--data", "d", "--suite", "quick"], "give --data for held-out loss, or --suite or --tasks"),
        (["--data", "d", "--limit", "3", "--bench", "b"], "--limit, --bench: of no use with --data"),
        (["--suite", "quick", "--window", "3"], "--window: of no use with --suite and --tasks"),
        (["--suite", "qick"], "--suite: no suite 'qick', did you mean quick?"),
        (["--suite", "quick", "--tasks", "copy"], "--tasks: quick has no task 'copy', did you mean tnl_copy?"),
        (["--tasks", "hellaswagg"], "no task 'hellaswagg', did you mean hellaswag?"),
        (["--tasks", " , "], "--tasks: names none"),
        (["--tasks", "arc_challenge,openllm"], "arc_challenge: wanted in two ways (as it is, {'fewshot_split': "),
        (["--tasks", "humaneval"], "humaneval: runs programs that the model writes"),
        (["--suite", "quick", "--bench", "nope.json"], "nope.json: No such file or directory; correct --bench"),
        (["--tasks", "boolq", "--data-dir", "nope"], "nope: no such folder; correct --data-dir"),
        (["--tasks", "boolq,piqa"], "nothing to measure"),
    ],
)
def test_what_is_wrong_is_one_message(options, message, folder, tnl_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = tnl_command("evaluate", folder / "model", *options)
    assert code in (EXIT_USAGE, EXIT_DATA)
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_metric_that_a_task_has_not_is_refused_before_the_model_is_loaded(folder, tnl_command, tmp_path):
    suite = "title: t\ntasks: [{task: piqa, column: P, metric: token_perplexity}]\n"
    (tmp_path / "mine.yaml").write_text(suite)
    options = ["--suite", tmp_path / "mine.yaml", "--data-dir", folder / "tasks", "--output", tmp_path / "out"]
    code, _, err = tnl_command("evaluate", folder / "model", *options)
    assert (code, "piqa: no metric 'token_perplexity', known: acc, acc_norm" in err) == (EXIT_USAGE, True)
    assert not (tmp_path / "out").exists()


def test_unsafe_tasks_are_taken_when_confirmed(folder, tnl_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = tnl_command("evaluate", folder / "model", "--tasks", "humaneval", "--confirm-unsafe")
    # Its metric is a program of the hub, which is not there.
    assert (code, "runs programs" in err, "nothing to measure" in err) == (EXIT_DATA, False, True)


def test_a_tokenizer_that_does_not_fit_is_refused(folder, tnl_command, tmp_path):
    other = tiny_folder(tmp_path)
    released_tokenizer(tmp_path / "large", tiny_sentencepiece())
    for file in other.glob("token*"):
        file.unlink()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (other / name).write_bytes((tmp_path / "large" / name).read_bytes())
    options = ["--tasks", "boolq", "--data-dir", folder / "tasks", "--output", tmp_path / "out"]
    code, _, err = tnl_command("evaluate", other, *options)
    assert code == EXIT_USAGE
    assert "has vocab_size 340; the two files belong to different models" in err


def test_without_lm_eval_one_message_says_what_to_install(folder, tnl_command, monkeypatch):
    monkeypatch.setattr("tnl.evaluation.harness_package.find_spec", lambda name: None)
    code, _, err = tnl_command("evaluate", folder / "model", "--suite", "quick")
    assert code == EXIT_USAGE
    assert "pip install 'transnormer-llm[eval]'" in err


def test_a_perplexity_beyond_all_numbers_is_one_message(folder, tnl_command, tmp_path):
    write_rows(tmp_path / "tasks/wikitext/test.jsonl", [{"page": "word" * 400}])
    options = ["--tasks", "wikitext", "--data-dir", tmp_path / "tasks", "--output", tmp_path / "out"]
    code, _, err = tnl_command("evaluate", folder / "model", *options)
    assert code == EXIT_NON_FINITE
    assert "error: wikitext: a perplexity is beyond all numbers, as per word of a text without spaces" in err


# Kill and resume


def options_of(folder, output) -> SuiteOptions:
    return SuiteOptions(None, ("boolq", "hellaswag", "wikitext"), output, data_dir=folder / "tasks", batch_tokens=64)


def evaluate_and_die(folder, output) -> None:
    """As the command does, until the cache has a few results."""
    put = SampleCache.put

    def put_or_die(self, results):
        put(self, results)
        if len(self) >= 8:
            os.kill(os.getpid(), signal.SIGKILL)

    harness_model.SampleCache.put = put_or_die
    evaluate_suite(str(folder / "model"), options_of(folder, output), report=lambda text: None)


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_scores(folder, tmp_path):
    whole = evaluate_suite(str(folder / "model"), options_of(folder, tmp_path / "whole"), report=lambda text: None)
    process = CONTEXT.Process(target=evaluate_and_die, args=(folder, tmp_path / "killed"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    known = len(SampleCache(tmp_path / "killed/samples"))
    assert not (tmp_path / "killed/scores.json").exists()
    again = evaluate_suite(str(folder / "model"), options_of(folder, tmp_path / "killed"), report=lambda text: None)
    counts = again.record["model"]["counts"]
    assert counts["from_cache"] == known
    assert 0 < known < counts["requests"]
    assert _rounded(again.record["details"]) == _rounded(whole.record["details"])
    assert _rounded(again.record["losses"]) == _rounded(whole.record["losses"])
    prompts = [(tmp_path / name / "prompts/hellaswag.jsonl").read_text() for name in ("whole", "killed")]
    contexts = [[json.loads(line)["context"] for line in text.splitlines()] for text in prompts]
    assert contexts[0] == contexts[1]


def _rounded(rows: list[dict]) -> list[dict]:
    """Rows with numbers as far as batches of other sizes leave them alone."""
    return [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]


# Scrolls and the quick suite


def test_scrolls_is_measured_without_code_of_the_hub(folder, tmp_path):
    text = "the state of self return value for in range"
    rows = {
        "gov_report": [{"id": "1", "input": text, "output": "the state of self"}],
        "qasper": [
            {"id": "1", "input": f"which value?\n\n{text}", "output": "the value"},
            {"id": "2", "input": f"is it self?\n\n{text}", "output": "Yes"},
        ],
        "quality": [{"id": "1", "input": f"what?\n\n(A) self (B) state (C) range (D) of\n\n{text}", "output": "state"}],
        "contract_nli": [{"id": "1", "input": f"it is self\n\n{text}", "output": "Entailment"}],
    }
    for name, found in rows.items():
        rest = [row | {"id": f"{row['id']}b"} for row in found]
        write_rows(tmp_path / "tasks/tau/scrolls" / name / "validation.jsonl", [*found, *rest])
    options = SuiteOptions(
        None, tuple(f"scrolls_{name}" for name in rows), tmp_path / "out", data_dir=tmp_path / "tasks"
    )
    found = evaluate_suite(str(folder / "model"), options, report=lambda text: None)
    metrics = {(score["task"], score["metric"]) for score in found.record["details"]}
    assert metrics >= {("scrolls_gov_report", "rougeL"), ("scrolls_qasper", "f1"), ("scrolls_quality", "acc_norm")}
    assert all(0 <= score["value"] <= 1 for score in found.record["details"])
    lines = (tmp_path / "out/prompts/scrolls_qasper.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["answers"]) for line in lines] == [1, 2, 1, 2]
    quality = json.loads((tmp_path / "out/prompts/scrolls_quality.jsonl").read_text().splitlines()[0])
    assert quality["continuations"] == [" self", " state", " range", " of"]
    assert "(A)" not in quality["context"]


def test_the_quick_suite_needs_nothing(folder, tnl_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = tnl_command("evaluate", folder / "model", "--suite", "quick", "--limit", "4")
    assert code == 0
    assert (tmp_path / "evaluation/model-quick/index.html").is_file()
    for column in ("Copy", "Arithmetic", "Next line", "Repeat", "per byte", "chance"):
        assert column in out


# Empty answers


EMPTY = """
title: Two tasks
tasks:
  - {task: tnl_repeat, column: Repeat, metric: exact_match, allow_empty: true}
  - {task: mmlu_anatomy_generative, column: Anatomy, metric: exact_match}
"""


@pytest.fixture
def write_answers(monkeypatch):
    """Have the model answer every task with these texts in turn."""

    def write(*texts):
        def generate(self, requests, disable_tqdm=False):
            return [texts[i % len(texts)] for i in range(len(requests))]

        monkeypatch.setattr(harness_model.HarnessModel, "generate_until", generate)

    return write


def test_a_task_with_empty_answers_has_no_score_unless_they_are_allowed(folder, tnl_command, tmp_path, write_answers):
    write_answers("self ", "", "self ", " \n")
    arguments = ["evaluate", folder / "model", "--tasks", "tnl_repeat,tnl_copy", "--limit", "4", "--output", tmp_path]
    code, out, err = tnl_command(*arguments)
    assert code == EXIT_DATA
    reason = "the answers to 2 of 4 documents are empty (doc_id 1, 3); look at them in prompts/tnl_repeat.jsonl"
    assert "error: 1 of 2 tasks were not measured" in err
    assert f"tnl_repeat: {reason}" in err
    assert reason in out
    found = json.loads((tmp_path / "scores.json").read_text())
    assert list(found["scores"]) == ["tnl_copy"]
    assert found["empty_answers"] == {"tnl_repeat": {"documents": [1, 3], "total": 4, "allowed": False}}
    lines = [json.loads(line) for line in (tmp_path / "prompts/tnl_repeat.jsonl").read_text().splitlines()]
    assert [line["answers"] for line in lines[:2]] == [["self"], [""]]
    assert [line["texts"] for line in lines] == [["self "], [""], ["self "], [" \n"]]
    code, out, _ = tnl_command(*arguments, "--allow-empty")
    assert code == 0
    assert "empty answers counted as wrong" in (tmp_path / "report.md").read_text()
    found = json.loads((tmp_path / "scores.json").read_text())
    assert (set(found["scores"]), found["settings"]["allow_empty"]) == ({"tnl_repeat", "tnl_copy"}, True)
    assert found["empty_answers"]["tnl_repeat"]["allowed"]


def test_a_task_of_which_all_answers_are_empty_leaves_a_report(folder, tnl_command, tmp_path, write_answers):
    write_answers("")
    arguments = ["evaluate", folder / "model", "--tasks", "tnl_repeat", "--limit", "7", "--output", tmp_path]
    code, _, err = tnl_command(*arguments)
    assert code == EXIT_DATA
    assert "the answers to 7 of 7 documents are empty (doc_id 0, 1, 2, 3, 4, ...)" in err
    assert (tmp_path / "index.html").is_file()
    assert tnl_command("evaluate", folder / "model", "--data", tmp_path, "--allow-empty")[0] == EXIT_USAGE


def test_a_suite_says_of_each_task_whether_its_answers_may_be_empty(folder, tnl_command, tmp_path, write_answers):
    write_answers("", "self")
    (tmp_path / "two.yaml").write_text(EMPTY)
    rows = [{"question": "what", "choices": ["of", "in", "for", "self"], "answer": i % 4} for i in range(4)]
    for split in ("test", "dev"):
        write_rows(tmp_path / f"tasks/mmlu_anatomy_generative/{split}.jsonl", rows)
    arguments = ["--data-dir", tmp_path / "tasks", "--limit", "4", "--output", tmp_path / "out"]
    code, _, err = tnl_command("evaluate", folder / "model", "--suite", tmp_path / "two.yaml", *arguments)
    assert code == EXIT_DATA
    assert "mmlu_anatomy_generative: the answers to 2 of 4 documents are empty (doc_id 0, 2)" in err
    assert list(json.loads((tmp_path / "out/scores.json").read_text())["scores"]) == ["tnl_repeat"]
    group = ["evaluate", folder / "model", "--tasks", "mmlu_stem_generative", *arguments]
    code, _, err = tnl_command(*group)
    assert code == EXIT_DATA
    assert "have no data (" in err
    assert (
        "mmlu_stem_generative: 1 of its 19 tasks have empty answers (mmlu_anatomy_generative); look at them in prompts/"
    ) in err
    code, _, err = tnl_command(*group, "--allow-empty")
    assert "empty" not in err
    found = json.loads((tmp_path / "out/scores.json").read_text())
    assert [score["task"] for score in found["details"]] == ["mmlu_anatomy_generative"]


def test_empty_answers_are_refused_in_one_way(folder, tmp_path):
    wanted = [Wanted("mmlu_stem_generative"), Wanted("mmlu_anatomy_generative", allow_empty=True)]
    library = TaskLibrary(TaskData(folder / "tasks"))
    with pytest.raises(
        ConfigError, match=r"mmlu_anatomy_generative: wanted in two ways \(as it is, {'allow_empty': True"
    ):
        plan(library, wanted, confirm_unsafe=False)
    (tmp_path / "two.yaml").write_text(EMPTY + "  - {task: tnl_repeat, column: Again, metric: exact_match}\n")
    with pytest.raises(ConfigError, match="tnl_repeat has two values of allow_empty, give one"):
        load_suite(str(tmp_path / "two.yaml"))


def test_a_document_is_empty_once_however_often_it_is_answered_and_filtered():
    samples = [
        {"doc_id": doc_id, "filter": kept, "resps": resps}
        for kept in ("strict", "flexible")
        for doc_id, resps in ((7, [["self", " "]]), (2, [["self", "of"]]), (5, [[""], ["of"]]), (3, [[(-1.5, False)]]))
    ]
    assert empty_answers(samples) == EmptyAnswers((5, 7), 4)
