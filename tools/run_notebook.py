"""Run docs/pokediff.ipynb from top to bottom, and write it with what it shows.

    python -m tools.run_notebook --short                            # every cell with hardly any work: do they run?
    python -m tools.run_notebook --output docs/pokediff.ipynb       # after a change: as it is committed, in minutes

The notebook works in the repository's folder, whatever the current one: it writes to outputs/ and checkpoints/ there.
Needs the packages of requirements-notebook.txt.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from utils.cli import parse, setting
from utils.errors import UserError, one_line_errors, printable
from utils.files import write_text
from utils.packages import optional_package

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs/pokediff.ipynb"
REQUIREMENTS = "requirements-notebook.txt"
SHORT = "POKEDIFF_SHORT"  # the environment variable that the notebook's first cell reads
WIDEST, SCALED = 740, 540  # pixels: rendered images wider than the first are scaled to the second
ENOUGH = 15_000  # bytes of a rendered image, if one of these looks gives as few:
LOOKS = ((256, 85), (128, 75), (64, 65), (32, 55), (14, 38))  # colours of a PNG, quality of a JPEG
SHOWN = 2000  # characters of a failed cell's output
FOREIGN = re.compile(r"(?:/home|/root|/tmp|/usr|/Users|/work|/content)/[\w.]|\b[A-Z]:\\")  # begins a machine's path


@dataclass
class Settings:
    """The flags of this command."""

    short: bool = setting(False, "few images and few steps: whether every cell runs, in about a minute")
    output: str = setting("outputs/pokediff.ipynb", "notebook file to write")


def main() -> None:
    with one_line_errors():
        settings = parse(Settings, "Run docs/pokediff.ipynb from top to bottom, and write it with what it shows.",
                         prog="python -m tools.run_notebook")
        output = Path(settings.output)
        if output.suffix != ".ipynb" or output.is_dir():
            raise ValueError(f"--output must name a file that ends in .ipynb, not {output}")
        for package in ("ipykernel", "nbclient", "nbformat"):  # before minutes of work
            optional_package(package, "python -m tools.run_notebook", REQUIREMENTS)
        output.parent.mkdir(parents=True, exist_ok=True)
        book = run_notebook(NOTEBOOK, settings.short)
        write_notebook(book, output)
        print(printable(f"wrote {output}, {output.stat().st_size / 1000:,.0f} kB"))


def run_notebook(path: Path, short: bool) -> Any:
    """Execute all cells of a notebook in a new kernel of this Python, in the notebook's folder.

    Returns:
        The notebook, with outputs (nbformat's `NotebookNode`).

    Raises:
        UserError: for a file that is no notebook, a missing package, and a cell that fails, whose output is printed.
    """
    nbformat = optional_package("nbformat", "a notebook", REQUIREMENTS)
    nbclient = optional_package("nbclient", "a notebook", REQUIREMENTS)
    try:
        book = nbformat.read(path, as_version=4)
    except Exception as error:  # a damaged file makes nbformat raise nearly anything
        raise UserError(f"cannot read {path}: it is no notebook, or a damaged one") from error
    client = nbclient.NotebookClient(book, timeout=None, startup_timeout=300,
                                     resources={"metadata": {"path": str(path.resolve().parent)}})
    client.km = client.create_kernel_manager()
    client.km.kernel_spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    numbers = [i for i, cell in enumerate(book.cells) if cell.cell_type == "code"]
    with environment(**{SHORT: "1" if short else ""}), client.setup_kernel():
        for count, i in enumerate(numbers, 1):
            start, cell = time.monotonic(), book.cells[i]
            about = f"cell {count} of {len(numbers)}: {last_line(cell.source)}"
            try:
                client.execute_cell(cell, i)
            except (nbclient.exceptions.CellExecutionError, nbclient.exceptions.DeadKernelError) as error:
                raise failure(about, cell, error) from error
            if any(part.output_type == "error" for part in cell.outputs):  # of a magic, after which the cell goes on
                raise failure(about, cell, None)
            print(printable(f"{time.monotonic() - start:6.1f} s  {about}"), flush=True)
    return book


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables within a block; the kernel inherits them."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def last_line(source: str) -> str:
    """Return the last line of a cell that is not indented, by which its reader knows it."""
    lines = [line for line in source.splitlines() if line and line[0] not in " )]}"]
    return lines[-1][:70] if lines else ""


def failure(about: str, cell: Any, error: Exception | None) -> UserError:
    """Print the end of a failed cell's output, and return the error that says what failed."""
    text = "".join(tidy_text(part.text) for part in cell.outputs if part.output_type == "stream")
    print(text[-SHOWN:], end="" if text.endswith("\n") else "\n")
    told = [f"{part.ename}: {part.evalue}" for part in cell.outputs if part.output_type == "error"]
    message = (told or [str(error)])[0].splitlines() or ["the kernel died"]
    return UserError(f"{about} failed: {message[0]}; nothing was written")


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_notebook(book: Any, path: Path) -> None:
    """Write an executed notebook, small and without traces of the machine; whole or not at all.

    Raises:
        UserError: if an output holds an absolute path.
    """
    nbformat = optional_package("nbformat", "a notebook", REQUIREMENTS)
    for cell in book.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [tidy_output(output) for output in joined_streams(cell.outputs)]
            for output in cell.outputs:
                if found := FOREIGN.search(str(output.get("text", "")) + str(output.get("data", {}).get("text/plain"))):
                    raise UserError(f"an output shows a path of this machine, at {found[0]!r}, in the cell that ends "
                                    f"with: {last_line(cell.source)}")
    book.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                     "language_info": {"name": "python"}}
    write_text(path, nbformat.writes(book) + "\n")


def joined_streams(outputs: list[Any]) -> list[Any]:
    """Return a cell's outputs with pieces of the same stream made one: a progress bar comes in hundreds."""
    joined: list[Any] = []
    for output in outputs:
        before = joined[-1] if joined else None
        if before and output.output_type == before.output_type == "stream" and output.name == before.name:
            before.text += output.text
        else:
            joined.append(output)
    return joined


def tidy_output(output: Any) -> Any:
    """Return an output with its progress bars at their end, its images small, and its paths relative."""
    output.get("metadata", {}).clear()
    if output.output_type == "stream":
        output.text = tidy_text(output.text)
    elif "image/png" in output.get("data", {}):
        kind, data = shrink(base64.b64decode(output.data["image/png"]))
        output.data.clear()  # also of "<PIL.Image ...>"
        output.data[kind] = base64.b64encode(data).decode()
    return output


def tidy_text(text: str) -> str:
    """Return what a terminal shows of a text in the end: each line as its last carriage return left it, uncoloured."""
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text).replace(f"{ROOT}{os.sep}", "").replace("\r\n", "\n")
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    kept = [line for line, before in zip(lines, [None, *lines]) if line or before]  # no two empty lines in a row
    return "\n".join(kept)


def shrink(data: bytes) -> tuple[str, bytes]:
    """Return an image file of few bytes, and its MIME type.

    The smaller of a PNG with a palette, for few colours and sharp edges, and a JPEG, in the first of LOOKS that is
    small enough.
    """
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if image.width > WIDEST:
        image = image.resize((SCALED, round(image.height * SCALED / image.width)), Image.Resampling.LANCZOS)
    for colours, quality in LOOKS:
        png, jpeg = io.BytesIO(), io.BytesIO()
        few = image.quantize(colours, method=Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
        few.save(png, "PNG", optimize=True)
        image.save(jpeg, "JPEG", quality=quality, optimize=True)
        kind, file = min(("image/png", png), ("image/jpeg", jpeg), key=lambda candidate: candidate[1].tell())
        if file.tell() <= ENOUGH:
            break
    return kind, file.getvalue()


if __name__ == "__main__":
    main()
