"""Dialogues, in a fixed order, from instruction data of the common formats."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tnl.data.docstrings import signature_dialogues
from tnl.data.instruction_records import iterate_records
from tnl.data.records import SourceCounts, bad_record, check_bad_fraction, encodable, show, stdlib_folder
from tnl.data.settings import FORMAT_FIELDS, FinetuneDataSettings, InstructionSource
from tnl.errors import ConfigError, DataError, UserError, did_you_mean

Messages = list[dict[str, str]]

_ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_CURE = "correct the record, data.source.format or data.source.columns"


@dataclass(frozen=True)
class Dialogue:
    """One record: messages ``{"role": ..., "content": ...}``, an optional one of the system first, then user and
    assistant in turn; the last is the assistant's."""

    messages: Messages
    where: str  # file and line, for messages about it
    group: str  # dialogues of one group are held out together

    def is_held_out(self, seed: int, fraction: float) -> bool:
        """Whether the dialogue is among about ``fraction`` of all; a function of seed and group alone."""
        draw = hashlib.sha256(f"{seed}:".encode() + self.group.encode()).digest()
        return int.from_bytes(draw[:8], "big") < fraction * 2**64


def iterate_dialogues(
    settings: FinetuneDataSettings, counts: SourceCounts, special_names: frozenset[str]
) -> Iterator[Dialogue]:
    """Yield every dialogue of ``settings.source``, in an order that depends on the source alone.

    Args:
        counts: updated while iterating.
        special_names: of special tokens; a text that holds one is bad, for it would be read as that token.

    Raises:
        DataError: the source is missing, malformed (see `tnl.data.settings.RecordSource`), beyond its
            ``max_bad_fraction``, or without a single dialogue; its format cannot be told; no record has one of the
            ``columns``.
        ConfigError: ``columns`` maps what is no field of the format.
    """
    source = settings.source
    is_ours = not isinstance(source, InstructionSource)
    dialogues = _stdlib_dialogues if is_ours else _record_dialogues
    for dialogue in dialogues(source, counts):
        if name := _special_name(dialogue.messages, special_names):
            message = f"{dialogue.where}: a text holds {show(name)}, the name of a special token"
            bad_record(source, counts, message, "remove it")
            continue
        counts.documents += 1
        yield _with_system(dialogue, settings.system) if settings.system else dialogue
    if not is_ours:
        check_bad_fraction(source, counts)
    if counts.documents == 0:
        where = stdlib_folder() if is_ours else source.path
        raise DataError(f"{where}: no dialogue in it ({counts.bad} bad records); check data.source")


def _special_name(messages: Messages, names: frozenset[str]) -> str | None:
    return next((name for name in sorted(names) for message in messages if name in message["content"]), None)


def _with_system(dialogue: Dialogue, system: str) -> Dialogue:
    messages = dialogue.messages
    if messages[0]["role"] == "system":
        system, messages = f"{system}\n{messages[0]['content']}", messages[1:]
    return Dialogue([{"role": "system", "content": system}, *messages], dialogue.where, dialogue.group)


def _stdlib_dialogues(source, counts: SourceCounts) -> Iterator[Dialogue]:
    for file, line, question, answer in signature_dialogues(source, counts):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield Dialogue(messages, f"{file}:{line}", file)


def _record_dialogues(source: InstructionSource, counts: SourceCounts) -> Iterator[Dialogue]:
    parse = None if source.format == "auto" else _PARSERS[source.format]
    seen: dict[str | int, str] = {}
    unmet, fields = dict(source.columns), {}
    for where, record in iterate_records(source, counts, _CURE):
        try:
            if not isinstance(record, dict):
                raise ValueError(f"a record must be an object, found {type(record).__name__}")
            if unmet:
                fields |= dict.fromkeys(record)
                unmet = {field: name for field, name in unmet.items() if name not in record}
            record = _renamed(record, source.columns)
            parse = parse or _detected(source, record, where)
            messages = parse(record)
            _check_order(messages)
            _check_id(record, source.id_field, where, seen)
        except UserError:
            raise
        except ValueError as error:
            bad_record(source, counts, f"{where}: {error}", _CURE)
            continue
        content = "\0".join(f"{message['role']}:{message['content']}" for message in messages)
        yield Dialogue(messages, where, hashlib.sha256(content.encode()).hexdigest())
    if unmet and fields:
        field, name = next(iter(unmet.items()))
        raise DataError(
            f"{source.path}: data.source.columns.{field}: no record has a field {show(name)}, "
            f"{did_you_mean(show(name), map(show, fields))}"
        )


def _renamed(record: dict, columns: dict[str, str]) -> dict:
    """``record`` with the fields that ``columns`` names under the names of the format."""
    return {**record, **{field: record[name] for field, name in columns.items() if name in record}}


def _detected(source: InstructionSource, record: dict, where: str) -> Callable[[dict], Messages]:
    name = detect_format(record, where)
    try:
        source.check_columns(name)
    except ValueError as error:
        raise ConfigError(f"data.source.{error}") from None
    return _PARSERS[name]


def detect_format(record: dict, where: str) -> str:
    """The one format whose fields ``record`` has; raises `DataError` when it is none, or more than one."""
    found = [name for name, fields in FORMAT_FIELDS.items() if all(field in record for field in fields)]
    if len(found) == 1:
        return found[0]
    known = "; ".join(f"{name} ({', '.join(fields)})" for name, fields in FORMAT_FIELDS.items())
    what = f"could be {' or '.join(found)}" if found else "is none of the known formats"
    raise DataError(
        f"{where}: a record with the fields {show(', '.join(map(str, record)))} {what}; set data.source.format, "
        f"and data.source.columns where fields have other names; formats: {known}"
    )


def _text(record: dict, field: str, name: str | None = None) -> str:
    """A field that must be there and hold more than blanks."""
    name = name or f"field {show(field)}"
    if field not in record or record[field] is None:
        raise ValueError(f"no {name}, found {show(', '.join(map(str, record)))}")
    text = encodable(name, record[field])
    if not text or text.isspace():
        raise ValueError(f"{name} is empty")
    return text


def _optional_text(record: dict, field: str) -> str:
    value = record.get(field)
    return "" if value is None else encodable(f"field {show(field)}", value)


def _turn(question: str, answer: str, system: str = "") -> Messages:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _alpaca(record: dict) -> Messages:
    """With an input, the instruction stands before the dialogue and the input is what the user says, as the reference
    has it."""
    answer, further = _text(record, "output"), _optional_text(record, "input")
    if "instruction" not in record or record["instruction"] is None:
        raise ValueError(f"no field {show('instruction')}, found {show(', '.join(map(str, record)))}")
    instruction = _text(record, "instruction") if not further.strip() else _optional_text(record, "instruction")
    return _turn(further, answer, instruction) if further.strip() else _turn(instruction, answer)


def _prompt_completion(record: dict) -> Messages:
    return _turn(_text(record, "prompt"), _text(record, "completion"), _optional_text(record, "system"))


def _list_of_messages(record: dict, field: str, role_key: str, text_key: str, roles: dict[str, str]) -> Messages:
    if field not in record:
        raise ValueError(f"no field {show(field)}, found {show(', '.join(map(str, record)))}")
    found = record[field]
    if found == []:
        raise ValueError(f"field {show(field)} is an empty list; give a user's and an assistant's message")
    if not isinstance(found, list):
        raise ValueError(f"field {show(field)} must be a list of messages, found {type(found).__name__}")
    system = _optional_text(record, "system")
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for i, message in enumerate(found):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} must be an object, found {type(message).__name__}")
        role = message.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise ValueError(f"message {i}: {role_key} {show(str(role))} is none of {', '.join(roles)}")
        messages.append({"role": roles[role], "content": _text(message, text_key, f"{text_key} of message {i}")})
    return messages


def _sharegpt(record: dict) -> Messages:
    return _list_of_messages(record, "conversations", "from", "value", _SHAREGPT_ROLES)


def _messages(record: dict) -> Messages:
    return _list_of_messages(record, "messages", "role", "content", {role: role for role in _ROLES})


_PARSERS: dict[str, Callable[[dict], Messages]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
}


def _check_order(messages: Messages) -> None:
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for i, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[i % 2]:
            where = "the first message" if i == 0 else f"message {i + len(messages) - len(turns)}"
            after = "" if i == 0 else f" after {turns[i - 1]['role']}"
            raise ValueError(f"{where} is the {message['role']}'s{after}; user and assistant must take turns")
    if len(turns) < 2 or len(turns) % 2:
        raise ValueError("the last message must be the assistant's")


def _check_id(record: dict, id_field: str | None, where: str, seen: dict[str | int, str]) -> None:
    """Remember the record's id, if it has one; raises ValueError for one that another record has."""
    value = record.get(id_field) if id_field is not None else None
    if value is None:
        return
    if not isinstance(value, str | int):
        raise ValueError(f"field {show(id_field)} must be a string or an integer, found {type(value).__name__}")
    if value in seen:
        raise ValueError(f"{id_field} {show(str(value))} is that of {seen[value]}, too (data.source.id_field)")
    seen[value] = where
