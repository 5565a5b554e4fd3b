"""Command lines: settings are dataclasses, declared once with their help, range and default.

    @dataclass
    class Settings:
        num_images: int = setting(64, "number of images", above=0)
        device: str = device_setting()

    settings = parse(Settings, "Generate images from a checkpoint.")
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, TypeVar

from utils.device import DEVICES, PRECISIONS

Settings = TypeVar("Settings")
MAX_SEED = 2**62 - 1


def setting(default: Any, help: str, choices: Sequence[str] | None = None, *, kind: type | None = None,
            count: int | str | None = None, metavar: Any = None, positional: bool = False, above: float = -math.inf,
            least: float = -math.inf, below: float = math.inf, most: float = math.inf) -> Any:
    """Declare a field of a settings dataclass.

    Args:
        default: its type is the setting's, unless `kind` says otherwise; a switch if it is False or True (which
            --no_NAME turns off), several values for a tuple.
        help: the help text, without the default, which is appended unless it is empty or None.
        kind: type of the value, or of each of several (default: int for a tuple).
        count: argparse's nargs, e.g. 2 or "+".
        positional: an argument without a flag, which may be left out.
        above, least, below, most: the range; `above` and `below` exclude their end.
    """
    several = isinstance(default, tuple) or count not in (None, "?")
    kind = kind or (int if several else type(default))
    return field(default=default, metadata=dict(
        help=help, choices=choices, kind=kind, count=count or ("+" if several else None), metavar=metavar,
        positional=positional, limits=dict(above=above, least=least, below=below, most=most)))


def with_default(settings: type, name: str, default: Any) -> Any:
    """Declare the setting `name` of another dataclass with a default of its own."""
    return field(default=default, metadata=field_of(settings, name).metadata)


def field_of(settings: type, name: str) -> Field:
    """Return a dataclass field by its name."""
    return next(declared for declared in fields(settings) if declared.name == name)


def device_setting() -> Any:
    return setting("auto", f"{', '.join(DEVICES)}, cuda:1, ...; auto: CUDA, else MPS, else the CPU")


def precision_setting() -> Any:
    return setting("auto", "compute precision; auto: bf16 where the device computes in it",
                   PRECISIONS)


def seed_setting(help: str) -> Any:
    return setting(0, help, least=0, most=MAX_SEED)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help looks the same in every terminal."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=100),
                         allow_abbrev=False, **options)
        self.usage = f"{self.prog} [flags]"

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def add_settings(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add an argument to `parser` for each field of a settings dataclass."""
    for declared in fields(settings):
        meta = declared.metadata
        shown = " ".join(map(str, declared.default)) if isinstance(declared.default, tuple) else declared.default
        if declared.default is True:
            parser.add_argument(f"--no_{declared.name}", dest=declared.name, action="store_false",
                                help=argparse.SUPPRESS)  # named below
            shown = f"on; off: --no_{declared.name}"
        text = meta["help"] + (f" (default: {shown})" if shown not in ("", None) and shown is not False else "")
        options: dict[str, Any] = dict(help=text.replace("%", "%%"))
        if isinstance(declared.default, bool):
            options["action"] = "store_true"
        else:
            options |= dict(type=meta["kind"], choices=meta["choices"], nargs=meta["count"], metavar=meta["metavar"])
        if meta["positional"]:
            options["nargs"] = meta["count"] or "?"
        parser.add_argument(declared.name if meta["positional"] else f"--{declared.name}", **options)


def given_settings(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Parse the command line of a parser with `argument_default=SUPPRESS`; several values become a tuple."""
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in vars(parser.parse_args()).items()}


def parse(settings: type[Settings], description: str, prog: str | None = None) -> Settings:
    """Parse the command line into a settings dataclass.

    Raises:
        ValueError: for a value out of its range.
    """
    parser = Parser(description=description, argument_default=argparse.SUPPRESS, prog=prog)
    add_settings(parser, settings)
    parsed = settings(**given_settings(parser))
    check_ranges(parsed)
    return parsed


def check_ranges(settings: Any) -> None:
    """Raise ValueError, naming the range, for the first setting that is out of it."""
    for declared in fields(settings):
        value = getattr(settings, declared.name)
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) in (int, float):
                _check_range(declared, number)


def _check_range(declared: Field, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"--{declared.name} must be a finite number, not {value}")
    limits = declared.metadata["limits"]
    if not (limits["above"] < value < limits["below"] and limits["least"] <= value <= limits["most"]):
        words = dict(above="more than", least="at least", below="less than", most="at most")
        text = " and ".join(f"{words[name]} {limit}" for name, limit in limits.items() if math.isfinite(limit))
        raise ValueError(f"--{declared.name} must be {text}, not {value}")


def check_sub_folder(flag: str, name: str) -> None:
    """Raise ValueError if `name` is not the name of a sub-folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{flag} must be the name of a sub-folder, not {name}")
