"""The suites that ship: their settings, their tasks, and the published rows."""

import pytest

from tnl import config as configuration
from tnl.errors import ConfigError
from tnl.evaluation.suite_command import expand_suites, load_suite
from tnl.evaluation.suite_settings import SpeedSettings, SuiteSettings
from tnl.evaluation.task_data import TaskData
from tnl.evaluation.task_library import TaskLibrary

SUITES = configuration.shipped_names("evaluate")
COMMONSENSE = ["boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]


@pytest.fixture(scope="module")
def library():
    return TaskLibrary(TaskData(None))


def test_the_suites():
    assert SUITES == ["paper", "perplexity", "quick", "scaling-laws", "scrolls"]


@pytest.mark.parametrize("name", SUITES)
def test_the_tasks_of_a_suite_exist(name, library):
    for task in load_suite(name).tasks:
        selection = library.select(task.task)
        assert selection.leaves
        assert not any(library.is_unsafe(leaf) for leaf in selection.leaves)


def test_the_paper_suite_measures_as_published(library):
    suite = load_suite("paper")
    assert [task.task for task in suite.tasks] == [*COMMONSENSE, "mmlu", "cmmlu", "ceval-valid"]
    assert [task.num_fewshot for task in suite.tasks] == [0] * 8 + [5] * 3
    normalised = [task.column for task in suite.tasks if task.metric == "acc_norm"]
    assert normalised == ["HellaSwag", "ARC-c", "OBQA"]
    assert [len(library.select(name).leaves) for name in ("mmlu", "cmmlu", "ceval-valid")] == [57, 67, 52]


def test_published_rows_name_their_source():
    for name in SUITES:
        for row in load_suite(name).published:
            assert row.source
            assert row.scores
    rows = {(row.model, row.parameters): row.scores for row in load_suite("paper").published}
    ours = [rows[key] for key in (("TNL-385M", "0.39B"), ("TNL-1B", "1.0B"), ("TNL-7B", "6.8B"), ("TNL-15B", "15B"))]
    assert [row["MMLU"] for row in ours] == [25.90, 27.10, 43.10, 60.06]
    assert [row["C-Eval"] for row in ours] == [25.24, 26.01, 43.18, 53.01]
    assert "CMMLU" not in ours[3]
    assert {"LLaMA1", "LLaMA2", "Pythia", "RWKV"} <= {model for model, _ in rows}


@pytest.mark.parametrize("name", ["train", "generate"])
def test_published_speeds_load(name):
    assert configuration.load(SpeedSettings, f"speed/{name}").published


TREE = {"title": "t", "tasks": [{"task": "piqa", "column": "A", "metric": "acc"}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": [*TREE["tasks"], *TREE["tasks"]]}, "tasks: the column A is there twice"),
        ({"averages": [{"column": "M", "of": ["a"]}]}, "averages: no column a, did you mean A?"),
        (
            {"published": [{"model": "m", "parameters": "1B", "source": "s", "scores": {"B": 1.0}}]},
            "published.0.scores: no column B, known: A",
        ),
        (
            {"tasks": [*TREE["tasks"], {"task": "piqa", "column": "B", "metric": "acc", "num_fewshot": 2}]},
            "tasks: piqa has two values of num_fewshot",
        ),
        (
            {"tasks": [{"task": "piqa", "column": "A", "metrics": "acc"}]},
            "tasks.0.metrics: unknown key, did you mean metric",
        ),
        ({"tasks": []}, "tasks: none, give one or more"),
    ],
)
def test_a_suite_that_is_wrong_is_refused(changes, message):
    with pytest.raises(ConfigError, match=r"suite\.yaml: ") as error:
        configuration.validate(SuiteSettings, TREE | changes, "suite.yaml")
    assert message in str(error.value)


def test_suites_expand_to_their_tasks():
    assert expand_suites(["perplexity", "boolq", "wikitext"]) == ["wikitext", "wikitext103", "lambada_openai", "boolq"]


def test_a_name_that_nothing_has_is_answered_with_one_that_is_like_it(library):
    with pytest.raises(ConfigError, match=r"no task 'helaswag', did you mean hellaswag\?"):
        library.select("helaswag")
    # boolq stands in a file of another name.
    with pytest.raises(ConfigError, match=r"no task 'boolqq', did you mean boolq\?"):
        library.select("boolqq")
    with pytest.raises(ConfigError, match=r"no suite 'papers', did you mean paper\?"):
        load_suite("papers")


def test_tags_and_groups_with_changes_are_taken_apart(library):
    assert [leaf.name for leaf in library.select("ai2_arc").leaves] == ["arc_challenge", "arc_easy"]
    leaves = {leaf.name: leaf.changes for leaf in library.select("openllm").leaves}
    assert leaves["arc_challenge"]["num_fewshot"] == 25
    assert len(leaves) == 57 + 7


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_tasks_that_run_generated_code_are_known(name, library):
    assert all(library.is_unsafe(leaf) for leaf in library.select(name).leaves)
