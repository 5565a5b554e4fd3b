"""Draw the built-in data set to files.

    python -m critters                                            # 1,000 images of 64x64 in data/critters
    python -m critters --count 200 --image_size 32 --seed 7 --output data/small

Writes critter_00000.png ..., labels.csv (columns file,types) and the same as Hugging Face's metadata.csv to the folder,
and a contact sheet of all types to outputs/critters.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from critters.sets import contact_sheet, write_critters

CONTACT_SHEET = Path("outputs/critters.png")
LEAST = dict(count=1, image_size=8, seed=0)
LARGEST_IMAGE = 4096  # pixels a side


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line.

    Raises:
        ValueError: for a number out of its range, or an output folder that cannot be used.
    """
    parser = OneLineParser(prog="python -m critters", allow_abbrev=False,
                           description="Draw the built-in data set: a folder of critters with labels.csv and "
                           "metadata.csv.",
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="number of images")
    parser.add_argument("--image_size", type=int, default=64, help="width and height of an image, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="number of the set; each one has other critters")
    parser.add_argument("--output", type=Path, default=Path("data/critters"), help="folder to write to")
    args = parser.parse_args()
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if args.image_size > LARGEST_IMAGE:
        raise ValueError(f"--image_size must be at most {LARGEST_IMAGE}, not {args.image_size}")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file; name a folder")
    for table in ("labels.csv", "metadata.csv"):
        if (args.output / table).exists() and not any(args.output.glob("critter_*.png")):
            raise ValueError(f"--output {args.output} has a {table} of other images; name another folder")
    return args


def main() -> None:
    try:
        args = parse_arguments()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        write_critters(args.output, args.count, args.image_size, args.seed)
        CONTACT_SHEET.parent.mkdir(exist_ok=True)
        contact_sheet(args.image_size, args.seed).save(CONTACT_SHEET)
    except OSError as error:
        sys.exit(f"error: cannot write {error.filename or args.output}: {error.strerror or error}; make room there, or "
                 f"choose another --output")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{args.count} critters of {args.image_size}x{args.image_size} in {args.output}, "
          f"a contact sheet in {CONTACT_SHEET}")


if __name__ == "__main__":
    main()
