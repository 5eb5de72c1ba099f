"""Plain two-column tables for the terminal and for text files."""


def format_rows(title: str, rows: list[tuple[str, str]]) -> str:
    """``title`` and one line per row, the first column padded."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])
