"""What a widget or a link says, checked again: ComfyUI checks neither type nor range of what comes through links of any type."""

from collections.abc import Iterable
from types import UnionType

from .errors import INPUT

SHOWN = 80  # characters of a wrong value in a message


def is_number(value: object, kind: type | UnionType = int | float) -> bool:
    """Whether it is a number at all, which a bool is not."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_choice(name: str, value: object, offered: Iterable[str]) -> None:
    """Raise a ValueError unless ``value`` is one of the texts that are offered."""
    offered = tuple(offered)
    if not (isinstance(value, str) and value in offered):
        raise ValueError(f"{INPUT} {name} is {value!r:.{SHOWN}}; it must be one of {', '.join(offered)}.")


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """Raise a ValueError unless ``value`` is an int from ``least`` to ``most``."""
    if not (isinstance(value, int) and is_number(value) and least <= value <= most):
        raise ValueError(f"{INPUT} {name} is {value!r:.{SHOWN}}; it must be a whole number from {least} to {most}.")


def check_number(name: str, value: object, least: float, most: float) -> None:
    """Raise a ValueError unless ``value`` is a number from ``least`` to ``most``."""
    if not (isinstance(value, int | float) and is_number(value) and least <= value <= most):
        raise ValueError(f"{INPUT} {name} is {value!r:.{SHOWN}}; it must be a number from {least:g} to {most:g}.")


def check_kind(name: str, value: object, kind: type, expected: str) -> None:
    """Raise a ValueError unless ``value`` is an instance of ``kind``; ``expected`` says that to a person."""
    if not isinstance(value, kind):
        raise ValueError(f"{INPUT} {name}: got {type(value).__name__}, expected {expected}.")


def check_has(name: str, value: object, attribute: str, expected: str) -> None:
    """Raise a ValueError unless ``value`` has what it is used for: other packs have classes of their own."""
    if not hasattr(value, attribute):
        raise ValueError(f"{INPUT} {name}: got {type(value).__name__}, expected {expected}.")
