"""Lists of numbers as they are given on the command line."""

from tnl.errors import ConfigError


def numbers_of(option: str, text: str, least: int) -> list[int]:
    """The whole numbers of a comma-separated list, in rising order.

    Raises:
        ConfigError: it is none, or a number is below ``least``.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdecimal() and least <= int(part) < 2**31 for part in parts):
        raise ConfigError(f"{option}: {text!r} is no list of whole numbers of at least {least}; give for example 1,16")
    return sorted({int(part) for part in parts})
