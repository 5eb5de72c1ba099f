"""Puts measured tables into a document, from the JSON files that the benchmarks write.

    python kernels/benchmarks/tables.py [--check] [kernels/README.md]

What stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` is replaced by the table of results/NAME_h100.json,
or of results/NAME.json where the name ends with a GPU, such as train_scaling_h200. Several names with commas between
them are one table, in which a file that is not there is simply left out; the column ``result`` then says whose a row
is. After the name may stand, in any order:

    of=SECTION         a list of the file other than ``rows``
    KEY=VALUE          only rows whose KEY is VALUE; that column is then left out (_ in VALUE stands for a space)
    columns=A,B:HEAD   these columns in this order, B under another heading (_ stands for a space); A% in percent
"""

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
GPU = re.compile(r"_[a-z]+[0-9]+$")
MARKER = re.compile(r"(<!-- table: ([^>]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def number(value: object) -> str:
    """A cell: about three digits of a float, the sizes of a shape, ``-`` for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        digits = 2 if abs(value) >= 1 else 3
        text = f"{value:.{digits}f}" if 1e-3 <= abs(value) < 10 else f"{value:.3g}"
        return f"{value:.0f}" if abs(value) >= 1000 else text
    if isinstance(value, list):
        return " x ".join(map(number, value))
    return str(value).replace("|", "\\|")


def percent(value: object) -> str:
    """A cell of a share."""
    return f"{100 * value:.1f} %" if isinstance(value, float) else number(value)


def read_options(text: str) -> tuple[list[str], str, dict[str, str], list[tuple[str, str]]]:
    """The words of a marker: names, section, filters, (column, heading) pairs.

    Raises:
        ValueError: a word is not KEY=VALUE.
    """
    name, *words = text.split()
    section, filters, columns = "rows", {}, []
    for word in words:
        key, separator, value = word.partition("=")
        if not separator or not value:
            raise ValueError(f"table {name}: {word!r} is not KEY=VALUE")
        if key == "of":
            section = value
        elif key == "columns":
            for column in value.split(","):
                column, _, heading = column.partition(":")
                columns.append((column, (heading or column.rstrip("%")).replace("_", " ")))
        else:
            filters[key] = value.replace("_", " ")
    return name.split(","), section, filters, columns


def file_of(name: str) -> str:
    """The file of a result."""
    return f"{name}.json" if GPU.search(name) else f"{name}_h100.json"


def read_result(path: Path) -> dict:
    """A result that says where it is from.

    Raises:
        ValueError: it does not.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    missing = {"gpu", "torch", "triton", "command"} - set(result)
    if missing:
        raise ValueError(f"{path.name} does not say {', '.join(sorted(missing))}")
    return result


def conditions(result: dict) -> str:
    """Where and, for training, with what it was measured."""
    count = f"{result['world_size']} x " if result.get("world_size", 1) > 1 else ""
    found = [f"{count}{result['gpu']}", f"torch {result['torch']}", f"triton {result['triton']}"]
    if "engine" in result:
        found += [result["engine"], result["dtype"]]
    if "world_size" in result:
        is_longer = any(row["length"] > result["tokens_per_step"] for row in result["rows"])
        found.append(f"{result['tokens_per_step']:,} tokens a step{' or one sequence' if is_longer else ''}")
    return ", ".join(found)


def table(text: str, results: Path = RESULTS) -> str:
    """The Markdown of the marker ``text``: a line on where it was measured, and the table.

    Raises:
        ValueError: a file, section, column or row that the marker names is missing.
    """
    names, section, filters, columns = read_options(text)
    title = ",".join(names)
    paths = {name: results / file_of(name) for name in names}
    there = {name: path for name, path in paths.items() if path.is_file()}
    if not there:
        missing = ", ".join(map(str, paths.values()))
        raise ValueError(f"table {title}: no {missing}; the benchmark writes it with --json")
    try:
        found = {name: read_result(path) for name, path in there.items()}
    except ValueError as error:
        raise ValueError(f"table {title}: {error}") from None
    files = ", ".join(path.name for path in there.values())
    rows = []
    for name, result in found.items():
        part = result.get(section)
        if not isinstance(part, list) or not part:
            lists = ", ".join(key for key, value in result.items() if isinstance(value, list))
            raise ValueError(f"table {title}: {there[name].name} has no rows under {section!r}; there are: {lists}")
        rows += [{"result": name} | row for row in part] if len(names) > 1 else part
    keys = list(dict.fromkeys(key for row in rows for key in row))
    for key in [*filters, *(column.rstrip("%") for column, _ in columns)]:
        if key not in keys:
            raise ValueError(f"table {title}: {files} has no column {key!r}; there are: {', '.join(keys)}")
    rows = [row for row in rows if all(str(row.get(key)) == value for key, value in filters.items())]
    if not rows:
        raise ValueError(f"table {title}: no row of {files} has {filters}")
    columns = columns or [(key, key.replace("_", " ")) for key in keys if key not in filters]
    lines = [
        [heading for _, heading in columns],
        ["---"] * len(columns),
        *([(percent if key.endswith("%") else number)(row.get(key.rstrip("%"))) for key, _ in columns] for row in rows),
    ]
    where = "; ".join(dict.fromkeys(map(conditions, found.values())))
    return "\n".join([f"Measured on {where}.", "", *(f"| {' | '.join(line)} |" for line in lines)])


def fill(document: str, results: Path = RESULTS) -> str:
    """``document`` with every marked table made anew.

    Raises:
        ValueError: as `table`, or a marker without its end.
    """
    found = MARKER.findall(document)
    if len(found) != document.count("<!-- table:") or len(found) != document.count("<!-- end -->"):
        raise ValueError("each <!-- table: NAME --> needs a line <!-- end --> behind it, before the next")
    for _, _, body, _ in found:
        if "<!-- table:" in body:
            raise ValueError("each <!-- table: NAME --> needs a line <!-- end --> behind it, before the next")
    return MARKER.sub(lambda match: f"{match[1]}{table(match[2], results)}\n{match[4]}", document)


def main(argv: list[str] | None = None) -> int:
    """The command line: exit code 1 with --check when the document is not what it would be, or cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path, nargs="?", default=README)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON files are")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the document is stale")
    arguments = parser.parse_args(argv)
    if not arguments.document.is_file():
        parser.error(f"no such file: {arguments.document}")
    before = arguments.document.read_text(encoding="utf-8")
    try:
        after = fill(before, arguments.results)
    except ValueError as error:
        print(f"{arguments.document}: {error}", file=sys.stderr)
        return 1
    if arguments.check:
        if before != after:
            print(f"{arguments.document} is stale: run python kernels/benchmarks/tables.py", file=sys.stderr)
        return int(before != after)
    arguments.document.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
