"""Data of tasks come from a folder or the datasets cache, or are said to be missing; nothing else is read or run."""

import datasets
import evaluate
import pytest
from lm_eval.api.registry import get_metric

from tests.task_files import COUNT, TASKS, write_rows, write_tasks
from tnl.errors import DataError
from tnl.evaluation import quick_tasks
from tnl.evaluation.hub_programs import hub_programs
from tnl.evaluation.quick_tasks import QUICK_TASKS
from tnl.evaluation.task_data import MissingDataError, TaskData, without_network
from tnl.evaluation.task_fetch import fetch
from tnl.evaluation.task_library import Leaf, TaskLibrary

NAMES = {"baber/piqa": "piqa", "ai2_arc/ARC-Easy": "arc_easy"}


def build(folder, name, num_fewshot=None):
    return TaskLibrary(TaskData(folder)).build(Leaf(name), num_fewshot)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return TaskLibrary(TaskData(write_tasks(tmp_path_factory.mktemp("tasks"))))


@pytest.mark.parametrize("folder", TASKS)
def test_a_task_is_built_from_the_file_of_the_split_that_it_asks(folder, library):
    name = NAMES.get(folder, folder)
    task = library.build(Leaf(name), None)
    assert len(task.eval_docs) == COUNT
    files = {file.rpartition("/")[2]: len(digest) for file, digest in library.data.sources[name].items()}
    assert files == {f"{split}.jsonl": 64 for split in TASKS[folder][0]}


def test_parquet_in_several_files_is_the_same_data(tmp_path, library):
    write_tasks(tmp_path / "jsonl", ("hellaswag",))
    rows = datasets.Dataset.from_json(str(tmp_path / "jsonl/hellaswag/validation.jsonl"), cache_dir=str(tmp_path))
    target = tmp_path / "parquet/Rowan/hellaswag"
    target.mkdir(parents=True)
    for part, indices in enumerate(([0, 1], [2, 3, 4, 5])):
        rows.select(indices).to_parquet(target / f"validation-0000{part}-of-00002.parquet")
    found = build(tmp_path / "parquet", "hellaswag").eval_docs
    expected = build(tmp_path / "jsonl", "hellaswag").eval_docs
    assert [doc["query"] for doc in found] == [doc["query"] for doc in expected]


def test_missing_data_are_named_with_what_fetches_them(tmp_path):
    with pytest.raises(MissingDataError) as error:
        build(tmp_path, "winogrande")
    assert str(error.value) == (
        f"winogrande: its data set allenai/winogrande (winogrande_xl) is neither in {tmp_path} nor in the cache of "
        "datasets; where there is a network: tnl data fetch winogrande"
    )


def test_files_on_the_hub_that_a_task_names_are_missing_data():
    with pytest.raises(MissingDataError, match=r"is not in the cache of datasets; .*: tnl data fetch prost"):
        build(None, "prost")


def test_a_task_that_ends_the_process_is_left_out(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DataError, match=r"slr_bench_hard: cannot be built .*SWI-Prolog"):
        build(None, "slr_bench_hard")


def test_nobody_is_asked_and_the_switch_is_set_back(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with without_network(), pytest.raises(OfflineModeIsEnabled):
        HfApi().dataset_info("baber/piqa")
    assert not datasets.config.HF_HUB_OFFLINE
    original = datasets.load_dataset
    with pytest.raises(MissingDataError):
        build(None, "piqa")
    assert datasets.load_dataset is original


def test_code_beside_data_is_not_run(tmp_path):
    canary = tmp_path / "canary"
    write_tasks(tmp_path, ("boolq",))
    program = f"open({str(canary)!r}, 'w')\n"
    for file in ("boolq/boolq.py", "script/script.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(program)
    build(tmp_path, "boolq")
    with pytest.raises(DataError):
        TaskData(None).read("boolq", str(tmp_path / "script"))
    assert not canary.exists()


def test_a_metric_that_is_a_program_of_the_hub_is_not_run():
    original, found = evaluate.load, []
    # lm-eval logs what went wrong, and goes on without the metric.
    with pytest.raises(DataError, match="its metric rouge is a program of the hub"), hub_programs(allowed=False):
        found.append(get_metric("rouge", hf_evaluate_metric=True))
    assert found == [None]
    assert evaluate.load is original
    with hub_programs(allowed=True):
        assert evaluate.load is original


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"goal": 1\n', "validation.jsonl:1: not JSON"),
        ("[1]\n", "validation.jsonl:1: not a JSON object"),
        ("\n", "validation.jsonl: has no rows"),
        ('{"goal": "a"}\n{"goal": 1}\n', "validation.jsonl: Expected bytes, got a 'int' object"),
        ('{"goals": "a", "label": 0}\n', "piqa: cannot be built (UndefinedError: 'goal' is undefined)"),
        ('{"goal": "a", "sol1": "b", "sol2": "c", "label": "1"}\n', "its answers, as '1', are none of the choices"),
        (
            '{"goal": "a", "sol1": "b", "sol2": "c", "label": -1}\n',
            "as -1, are none of the choices); its data must have",
        ),
        ('{"goal": "a", "sol1": "b", "sol2": "c", "label": 1.0}\n', "its answers, as 1.0, are none of the choices"),
    ],
)
def test_a_file_that_is_wrong_is_named(content, message, tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.jsonl").write_text(content)
    with pytest.raises(DataError) as error:
        build(tmp_path, "piqa")
    assert message in str(error.value)


def test_a_row_that_cannot_be_scored_is_named(tmp_path):
    row = {"goal": "a", "sol1": "b", "sol2": "c", "label": 1}
    write_rows(tmp_path / "piqa/validation.jsonl", [row, row | {"label": None}])
    task, answers = build(tmp_path, "piqa"), [(-1.0, False), (-2.0, False)]
    assert task.process_results(task.eval_docs[0], answers)["acc"] == 0
    with pytest.raises(DataError, match=r"piqa: an answer cannot be scored \(TypeError: .*, or leave it out"):
        task.process_results(task.eval_docs[1], answers)


def test_a_split_that_is_not_there_is_named(tmp_path):
    write_tasks(tmp_path, ("boolq",))
    (tmp_path / "boolq/validation.jsonl").rename(tmp_path / "boolq/test.jsonl")
    with pytest.raises(DataError, match="there is no split validation"):
        build(tmp_path, "boolq")


def test_more_examples_than_there_are_are_refused(tmp_path):
    write_tasks(tmp_path, ("mmlu_anatomy",))
    assert build(tmp_path, "mmlu_anatomy", COUNT).get_config("num_fewshot") == COUNT
    with pytest.raises(DataError, match="mmlu_anatomy: 7 examples are asked for, its data have 6; give fewer"):
        build(tmp_path, "mmlu_anatomy", 7)


def test_examples_from_a_split_that_is_not_there_are_refused(tmp_path):
    write_tasks(tmp_path, ("boolq",))
    with pytest.raises(DataError, match="2 examples are asked for, its data have 0; bring the split train"):
        build(tmp_path, "boolq", 2)


def test_where_one_more_example_is_drawn_it_must_be_there(tmp_path):
    write_tasks(tmp_path, ("boolq",))
    (tmp_path / "boolq/train.jsonl").write_bytes((tmp_path / "boolq/validation.jsonl").read_bytes())
    assert build(tmp_path, "boolq", COUNT - 1).get_config("num_fewshot") == COUNT - 1
    with pytest.raises(DataError, match="boolq: 6 examples are asked for, its data have 6"):
        build(tmp_path, "boolq", COUNT)


@pytest.mark.parametrize("names", [("test-00000-of-00002",), ("test-00000-of-00001", "test"), ("test-00001-of-00001",)])
def test_a_split_that_is_there_in_part_or_twice_is_refused(names, tmp_path):
    for name in names:
        write_rows(tmp_path / f"lambada_openai/{name}.jsonl", [{"text": "a b"}])
    with pytest.raises(DataError, match="not the one file of the split test, nor all its parts"):
        build(tmp_path, "lambada_openai")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder; correct --data-dir"):
        TaskData(tmp_path / "nope")


def test_what_is_fetched_is_read_again(tmp_path):
    rows = {"id": "1", "pid": "1_0", "input": "which value?\n\nthe state of self", "output": "the state"}
    write_rows(tmp_path / "archive/validation.jsonl", [rows, rows | {"output": "self"}])
    asked, said = [], []

    def load(path, name=None, **options):
        asked.append((path, name, options))
        return datasets.DatasetDict(validation=datasets.Dataset.from_json(str(tmp_path / "archive/validation.jsonl")))

    folder = tmp_path / "tasks"
    fetch(["scrolls_qmsum", "tnl_copy"], folder, report=said.append, load=load)
    assert asked[0][0] == "json"
    assert asked[0][2]["data_files"]["validation"].endswith("/tau/scrolls/resolve/main/qmsum.zip")
    assert said == ["scrolls_qmsum: validation 2", "tnl_copy: makes its own data"]
    (document,) = build(folder, "scrolls_qmsum").eval_docs
    assert (document["question"], document["text"]) == ("which value?", "the state of self")
    assert document["outputs"] == ["the state", "self"]
    fetch(["scrolls_qmsum"], folder, report=said.append, load=load)
    assert (len(asked), said[-1]) == (1, "scrolls_qmsum: there already")


def test_one_data_set_that_cannot_be_had_leaves_the_others(tmp_path):
    class NoAnswerError(Exception):
        """As the client of the hub raises it."""

    def load(path, name=None, **options):
        if path == "baber/piqa":
            raise NoAnswerError("no network")
        return datasets.DatasetDict(validation=datasets.Dataset.from_list([{"a": 1}]))

    with pytest.raises(DataError, match=r"not fetched; (.|\n)*piqa: baber/piqa: no network"):
        fetch(["piqa", "boolq"], tmp_path / "tasks", report=lambda text: None, load=load)
    assert [file.name for file in (tmp_path / "tasks").iterdir()] == ["boolq"]


def test_texts_take_no_examples(tmp_path):
    write_tasks(tmp_path, ("wikitext",))
    assert build(tmp_path, "wikitext", 5).get_config("num_fewshot") == 0


@pytest.mark.parametrize("name", QUICK_TASKS)
def test_quick_tasks_make_the_same_data_every_time(name, library):
    first, second = (list(library.build(Leaf(name), None).eval_docs) for _ in range(2))
    assert first == second
    assert len(first) >= 20
    for document in first:
        if "choices" in document:
            assert len(set(document["choices"])) == 4


@pytest.mark.parametrize("name", ["tnl_next_line", "tnl_keyword"])
def test_modules_of_a_few_lines_are_passed_over(name, library, tmp_path, monkeypatch):
    """Python 3.12 moved the code of some modules: nine lines of datetime.py are left."""
    short = tmp_path / "short.py"
    short.write_text("try:\n    from _datetime import *\nexcept ImportError:\n    from _pydatetime import *\n")
    real = quick_tasks.library_file
    monkeypatch.setattr(quick_tasks, "library_file", lambda name: real(name) if name in "ast copy" else short)
    assert len(library.build(Leaf(name), None).eval_docs) == quick_tasks.DOCUMENTS
