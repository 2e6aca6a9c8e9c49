"""Command-line options made from the fields of a settings dataclass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

MOST_SEEDS = 1000


@dataclass(frozen=True)
class Option:
    """One option, --NAME. The command line passes a value of type `kind` to `parse`."""

    name: str
    help: str
    kind: type
    parse: Callable[[Any], Any]

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    def value(self, given: Any) -> Any:
        """Parse what the user gave. A ValueError names the option."""
        try:
            return self.parse(given)
        except ValueError as error:
            raise ValueError(f"{self.flag} {error}") from None


def option(default: Any, help: str, parse: Callable[[Any], Any] | None = None) -> Any:
    """Declare a settings field that is also a command-line option.

    `parse` turns the user's value into the field's value; the annotation of its parameter tells the command line what
    to accept. By default the field's own type does both. A subclass may change the default and keeps the help.
    """
    return field(default=default, metadata={"help": help, "parse": parse})


def options_of(settings: type) -> list[Option]:
    """Return the options of a settings class, in the order of its fields."""
    found = []
    types = get_type_hints(settings)
    for each in fields(settings):
        inherited = [base.__dict__.get("__dataclass_fields__", {}).get(each.name) for base in settings.__mro__]
        about = next((known.metadata for known in inherited if known is not None and known.metadata), None)
        if about is not None:
            kind = types[each.name]
            parse = about["parse"] or _BY_COMMA.get(kind, kind)
            if parse is not kind:
                kind = next(hint for name, hint in get_type_hints(parse).items() if name != "return")
            found.append(Option(each.name, _with_default(about["help"], each.default), kind, parse))
    return found


def names(text: str) -> tuple[str, ...]:
    """ "a, b" is a and b."""
    return tuple(name.strip() for name in text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    """ "1,2" is 1 and 2."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"must be numbers by comma, got {text!r}") from None


def seeds(text: str) -> tuple[int, ...]:
    """ "3" is 0, 1, 2; "1,2" is 1, 2; "2," is 2 alone."""
    found = numbers(text.rstrip(","))
    if "," in text:
        return found
    if not 1 <= found[0] <= MOST_SEEDS:
        raise ValueError(f"must be at least 1 and at most {MOST_SEEDS}, a number of seeds, got {found[0]}")
    return tuple(range(found[0]))


def absolute(path: Path) -> str:
    """Make the path independent of the working directory."""
    return str(path.absolute())


_BY_COMMA: dict[Any, Callable[[str], Any]] = {tuple[str, ...]: names, tuple[int, ...]: numbers}


def _with_default(help: str, default: Any) -> str:
    """Add the default to the help, unless the help mentions it already or the default is empty."""
    if "efault" in help or default in ("", ()):
        return help
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{help} Default: {shown}."
