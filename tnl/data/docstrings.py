"""Instruction data that is on every machine: signatures to write from docstrings of Python's standard library."""

import ast
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path

from tnl.data.records import SourceCounts, bad_record, stdlib_files
from tnl.data.settings import StdlibInstructions

_MAX_CHARACTERS = 400
# Tests and programs: two thirds of the text, with few documented functions.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3"}


def signature_dialogues(source: StdlibInstructions, counts: SourceCounts) -> Iterator[tuple[str, int, str, str]]:
    """``(file, line, question, answer)`` of each documented function, files sorted by name.

    The question is the function's name and the first paragraph of its docstring, the answer its ``def`` line. Where
    ``max_examples`` is set, those of lowest hash are taken. Of equal pairs only the first counts, so that none is both
    trained on and held out. Files that this Python cannot parse are counted as bad.
    """
    root, files = stdlib_files()
    found, seen = [], set()
    for file in files:
        name = file.relative_to(root).as_posix()
        if _LEFT_OUT & set(file.relative_to(root).parts):
            continue
        try:
            pairs = [(name, *pair) for pair in _pairs(file)]
        except (OSError, SyntaxError, ValueError) as error:
            bad_record(source, counts, f"{file}: cannot be parsed ({error})", "")
            continue
        for pair in pairs:
            if pair[2:] not in seen:
                seen.add(pair[2:])
                found.append(pair)
    if source.max_examples is not None:
        chosen = sorted(found, key=lambda pair: hashlib.sha256("\0".join(map(str, pair)).encode()).digest())
        kept = set(chosen[: source.max_examples])
        found = [pair for pair in found if pair in kept]
    yield from found


def _pairs(file: Path) -> list[tuple[int, str, str]]:
    """``(line, question, answer)`` of each function of a file that has a docstring, in their order in the file."""
    with warnings.catch_warnings():
        # Of escapes in string literals, which is nothing to a reader of this data.
        warnings.simplefilter("ignore")
        tree = ast.parse(file.read_bytes())
    pairs = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
        summary = " ".join(paragraph.split())
        keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        answer = f"{keyword} {node.name}({ast.unparse(node.args)}):"
        if summary and len(summary) + len(answer) <= _MAX_CHARACTERS:
            pairs.append((node.lineno, f"Write the signature of {node.name}: {summary}", answer))
    return sorted(pairs)
