"""The command line: errors in one line, and the kinds of number that the scripts' flags take.

    parser = Parser(description="...")
    parser.add_argument("--num_images", type=positive)
"""

from __future__ import annotations

import argparse
import math

from devices import DEVICES, PRECISIONS


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line; the list of all flags, which `--help` prints, would bury them."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    def add_device_flags(self) -> None:
        """--device and --precision, for pick_device and pick_precision of devices.py."""
        self.add_argument("--device", default="auto", help=f"{', '.join(DEVICES)}, cuda:1, ... (default: auto)")
        self.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the network's arithmetic; auto "
                          "is bf16 where the device has it (default: auto)")


def natural(text: str) -> int:
    """A seed, or a number that may be 0."""
    number = int(text)
    if not 0 <= number < 2**62:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^62 - 1, not {text}")
    return number


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


def fraction(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return number


def strength(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return number


def finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return number
