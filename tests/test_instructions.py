"""Instruction data: the formats, what is refused by file and line, what is skipped and counted."""

import json

import pytest
from pydantic import TypeAdapter

from tnl.data.instructions import iterate_dialogues
from tnl.data.records import SourceCounts
from tnl.data.settings import FinetuneDataSettings, Instructions
from tnl.errors import ConfigError, DataError

TURN = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SYSTEM = {"role": "system", "content": "s"}


def read(path, system=None, special=frozenset(), **source):
    settings = FinetuneDataSettings(source={"kind": "json", "path": str(path), **source}, system=system)
    counts = SourceCounts()
    return list(iterate_dialogues(settings, counts, special)), counts


def write(file, *records):
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return file


def share(*pairs, **more):
    return {"conversations": [{"from": who, "value": text} for who, text in pairs], **more}


GOOD = {
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, TURN),
    "alpaca without input": ({"instruction": "q", "output": "a"}, TURN),
    "alpaca, input None": ({"instruction": "q", "input": None, "output": "a"}, TURN),
    "alpaca with input": ({"instruction": "s", "input": "q", "output": "a"}, [SYSTEM, *TURN]),
    "alpaca, input only": ({"instruction": "", "input": "q", "output": "a"}, TURN),
    "sharegpt": (share(("human", "q"), ("gpt", "a"), ("user", "q"), ("assistant", "a")), TURN * 2),
    "sharegpt with a system turn": (share(("system", "s"), ("human", "q"), ("gpt", "a")), [SYSTEM, *TURN]),
    "sharegpt with a system field": (share(("human", "q"), ("gpt", "a"), system="s"), [SYSTEM, *TURN]),
    "messages": ({"messages": [SYSTEM, *TURN, *TURN], "source": "x"}, [SYSTEM, *TURN, *TURN]),
    "pair": ({"prompt": "q", "completion": "a"}, TURN),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("as_array", [False, True], ids=["lines", "array"])
def test_every_format_is_told_by_its_fields(tmp_path, name, as_array):
    record, expected = GOOD[name]
    text = json.dumps([record, record], indent=1) if as_array else f"{json.dumps(record)}\n\n{json.dumps(record)}"
    (tmp_path / "data.json").write_text(text)
    dialogues, counts = read(tmp_path / "data.json")
    assert [dialogue.messages for dialogue in dialogues] == [expected, expected]
    assert counts.documents == 2
    assert dialogues[0].where == f"{tmp_path}/data.json:{2 if as_array else 1}"


BAD = {
    "no output": ({"instruction": "q", "input": ""}, "no field 'output', found 'instruction, input'"),
    "empty output": ({"instruction": "q", "output": " \n"}, "field 'output' is empty"),
    "no instruction": ({"instruction": "", "input": "", "output": "a"}, "field 'instruction' is empty"),
    "input alone": ({"input": "x", "output": "a"}, "no field 'instruction', found 'input, output'"),
    "instruction null": ({"instruction": None, "input": "x", "output": "a"}, "no field 'instruction'"),
    "number": ({"instruction": "q", "output": 7}, "'output' must be a string, found int"),
    "number as input": ({"instruction": "q", "input": [], "output": "a"}, "'input' must be a string, found list"),
    "surrogate": ({"instruction": "q", "output": "\ud800"}, "half of a surrogate pair"),
    "array": (["q"], "a record must be an object, found list"),
    "special token": ({"instruction": "q", "output": "a</s>b"}, "'</s>', the name of a special token"),
    "cut": ('{"instruction": "q', "Unterminated string"),
    "twice a key": ('{"instruction": "q", "output": "a", "output": "b"}', "a key stands twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_refused_by_line_or_counted(tmp_path, name):
    record, message = BAD[name]
    good = {"instruction": "q", "output": "a"}
    file = write(tmp_path / "data.jsonl", good, record, good)
    with pytest.raises(DataError, match=message) as raised:
        read(file, special=frozenset({"</s>"}))
    assert str(raised.value).startswith(f"{file}:2: ")
    assert "data.source.on_bad: skip" in str(raised.value)
    dialogues, counts = read(file, special=frozenset({"</s>"}), on_bad="skip", max_bad_fraction=0.5)
    assert (len(dialogues), counts.bad) == (2, 1)
    with pytest.raises(DataError, match=r"1 of 3 records are bad, more than data\.source\.max_bad_fraction 0\.3"):
        read(file, special=frozenset({"</s>"}), on_bad="skip", max_bad_fraction=0.3)


def turns(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


WRONG_ORDER = {
    "assistant first": (turns("assistant", "user"), "the first message is the assistant's; user and assistant must"),
    "two users": (turns("user", "user", "assistant"), "message 1 is the user's after user"),
    "system later": (turns("user", "system", "assistant"), "message 1 is the system's after user"),
    "no answer": (turns("user"), "the last message must be the assistant's"),
    "ends with the user": (turns("system", "user", "assistant", "user"), "the last message must be the assistant's"),
    "system alone": (turns("system"), "the last message must be the assistant's"),
    "unknown role": (turns("user", "tool"), "message 1: role 'tool' is none of system, user, assistant"),
    "no role": ({"messages": [{"content": "x"}]}, "message 0: role 'None' is none of"),
    "no content": ({"messages": [{"role": "user"}]}, "no content of message 0"),
    "empty content": ({"messages": [*TURN, {"role": "user", "content": ""}]}, "content of message 2 is empty"),
    "no messages": ({"messages": []}, "field 'messages' is an empty list; give a user's and an assistant's message"),
    "text": ({"messages": "hello"}, "must be a list of messages, found str"),
    "texts": ({"messages": ["hello"]}, "message 0 must be an object, found str"),
}


@pytest.mark.parametrize("name", WRONG_ORDER)
def test_messages_in_no_order_are_refused(tmp_path, name):
    record, message = WRONG_ORDER[name]
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "data.jsonl", record))


def test_a_second_record_with_an_id_is_bad_unless_ids_mean_nothing(tmp_path):
    record = {"id": "x", "prompt": "q", "completion": "a"}
    file = write(tmp_path / "data.jsonl", record, record | {"id": None}, record)
    with pytest.raises(DataError, match=rf"data\.jsonl:3: id 'x' is that of {tmp_path}/data\.jsonl:1, too"):
        read(file)
    assert len(read(file, id_field=None)[0]) == 3
    with pytest.raises(DataError, match="field 'id' must be a string or an integer, found list"):
        read(write(file, record | {"id": ["x"]}))


def test_columns_rename_fields_and_an_unclear_format_is_asked_for(tmp_path):
    file = write(tmp_path / "data.jsonl", {"question": "q", "answer": "a"})
    with pytest.raises(DataError, match=r"fields 'question, answer' is none of the known formats; set data\.source"):
        read(file)
    columns = {"instruction": "question", "output": "answer"}
    assert read(file, columns=columns)[0][0].messages == TURN
    both = write(tmp_path / "both.jsonl", {"prompt": "q", "completion": "a", "instruction": "i", "output": "o"})
    with pytest.raises(DataError, match=r"could be alpaca or prompt_completion; set data\.source\.format"):
        read(both)
    assert read(both, format="prompt_completion")[0][0].messages == TURN


def test_columns_that_name_nothing_are_refused(tmp_path):
    file = write(tmp_path / "data.jsonl", {"instruction": "q", "output": "a", "context": "c"})
    columns = {"inptu": "context"}
    with pytest.raises(ValueError, match=r"columns\.inptu: no field of the format alpaca, did you mean input\?"):
        read(file, format="alpaca", columns=columns)
    with pytest.raises(ValueError, match=r"columns\.inptu: no field of any format, did you mean input\?"):
        read(file, columns=columns)
    with pytest.raises(
        ConfigError, match=r"^data\.source\.columns\.system: no field of the format alpaca, known: instr"
    ):
        read(file, columns={"system": "context"})
    with pytest.raises(DataError, match=r"columns\.input: no record has a field 'contxt', did you mean 'context'\?"):
        read(file, columns={"input": "contxt"})
    some = write(
        tmp_path / "some.jsonl",
        {"instruction": "q", "output": "a"},
        {"context": "q", "output": "a", "instruction": "s"},
    )
    assert [d.messages for d in read(some, columns={"input": "context"})[0]] == [TURN, [SYSTEM, *TURN]]


BROKEN = {
    "record": ('[\n{"a": 1},\n{"a": \n]', 4, "Expecting value"),
    "comma": ('[\n{"prompt": "q", "completion": "a"}\n{}]', 3, "expected , or ]"),
    "end": ('[{"prompt": "q", "completion": "a"}', 1, "expected , or ]"),
    "behind": ('[{"prompt": "q", "completion": "a"}]\n\nx', 3, "something follows the array"),
    "trailing comma": ('[{"prompt": "q", "completion": "a"},\n\n]', 3, "no record between , and ]"),
    "deep": ("[" * 100_000, 1, "recursion"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_array_is_refused_by_line_even_when_bad_records_are_skipped(tmp_path, name):
    text, line, message = BROKEN[name]
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        read(tmp_path / "data.json", format="prompt_completion", on_bad="skip", max_bad_fraction=1)
    assert str(raised.value).startswith(f"{tmp_path}/data.json:{line}: ")


def test_an_array_with_a_byte_that_is_no_text_is_not_left_out(tmp_path):
    (tmp_path / "data.json").write_bytes(b'[{"prompt": "q", "completion": "a"},\n{"prompt": "\xff"}]')
    with pytest.raises(DataError, match=r"data\.json:2: not UTF-8 at byte 49"):
        read(tmp_path / "data.json", format="prompt_completion", on_bad="skip", max_bad_fraction=1)


def test_a_system_prompt_stands_before_every_dialogue_and_the_records_own(tmp_path):
    file = write(tmp_path / "data.jsonl", {"messages": TURN}, {"messages": [SYSTEM, *TURN]})
    dialogues, _ = read(file, system="Be brief.")
    assert [dialogue.messages[0]["content"] for dialogue in dialogues] == ["Be brief.", "Be brief.\ns"]
    assert all(dialogue.messages[1:] == TURN for dialogue in dialogues)


def test_a_source_without_a_dialogue_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no such file or folder; correct data\.source\.path"):
        read(tmp_path / "nothing")
    with pytest.raises(DataError, match="no dialogue in it"):
        read(write(tmp_path / "data.jsonl", ""))


def test_what_is_held_out_depends_on_the_text_alone(tmp_path):
    pairs = [{"prompt": f"q{i}", "completion": "a"} for i in range(400)]
    first, _ = read(write(tmp_path / "one.jsonl", *pairs))
    second, _ = read(write(tmp_path / "two.jsonl", *reversed(pairs)))
    held = [{d.messages[0]["content"] for d in own if d.is_held_out(3, 0.25)} for own in (first, second)]
    assert held[0] == held[1]
    assert 60 < len(held[0]) < 140
    assert held[0] != {d.messages[0]["content"] for d in first if d.is_held_out(4, 0.25)}


def test_dataset_rows_are_read_with_a_mapping(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"question": ["q", "q"], "answer": ["a", ""], "id": [1, 2]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    source = {"kind": "dataset", "columns": {"instruction": "question", "output": "answer"}}
    with pytest.raises(DataError, match=r"saved: row 1 of train: field 'output' is empty"):
        read(tmp_path / "saved", **source)
    dialogues, counts = read(tmp_path / "saved", **source, on_bad="skip", max_bad_fraction=0.5)
    assert [dialogue.messages for dialogue in dialogues] == [TURN]
    assert counts.bad == 1
    messages = {"messages": [TURN, [SYSTEM, *TURN]]}
    datasets.Dataset.from_dict(messages).save_to_disk(tmp_path / "chats")
    assert [d.messages for d in read(tmp_path / "chats", kind="dataset")[0]] == messages["messages"]


MODULE = '''
def plain(a, *, b=1):
    """Add
    two.

    More."""

class Thing:
    async def later(self) -> int:
        "Wait."
        def inner(): pass

def bare(): pass
'''


def test_signatures_of_the_standard_library_are_held_out_by_file(tmp_path, monkeypatch):
    (tmp_path / "test").mkdir()
    for name in ("a.py", "b.py", "test/c.py"):
        (tmp_path / name).write_text(MODULE if name == "a.py" else MODULE.replace("Add", "Sum"))
    (tmp_path / "bad.py").write_text("def")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    source = {"kind": "stdlib"}
    counts = SourceCounts()
    settings = FinetuneDataSettings(source=source)
    found = list(iterate_dialogues(settings, counts, frozenset()))
    pairs = [tuple(message["content"] for message in dialogue.messages) for dialogue in found]
    assert pairs == [
        ("Write the signature of plain: Add two.", "def plain(a, *, b=1):"),
        ("Write the signature of later: Wait.", "async def later(self):"),
        ("Write the signature of plain: Sum two.", "def plain(a, *, b=1):"),
    ]
    assert [dialogue.where for dialogue in found] == ["a.py:2", "a.py:9", "b.py:2"]
    assert [dialogue.group for dialogue in found] == ["a.py", "a.py", "b.py"]
    assert counts.bad == 1
    settings = FinetuneDataSettings(source=source | {"max_examples": 2})
    assert len(list(iterate_dialogues(settings, SourceCounts(), frozenset()))) == 2


def test_an_unknown_kind_of_source_is_refused():
    with pytest.raises(ValueError, match="kind"):
        TypeAdapter(Instructions).validate_python({"kind": "yaml", "path": "x"})
