"""The figures of an evaluate.py report as Markdown, for the card of an exported model.

    path = find_report(Path("checkpoints/mine/final_model.pt"))
    text = report_markdown(path, Path("checkpoints/mine/final_model.pt"))
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evaluation.meanings import table_rows
from models.pipeline import BY_TYPES
from utils.errors import UserError, first_line, printable
from utils.tables import markdown_table

DEFAULT_FOLDER = Path("outputs/evaluation")  # where evaluate.py writes


def find_report(checkpoint: Path) -> Path | None:
    """Return the report.json of a checkpoint: in its folder, in evaluation/ there, or where evaluate.py writes."""
    for path in (checkpoint.parent / "report.json", checkpoint.parent / "evaluation/report.json",
                 DEFAULT_FOLDER / "report.json"):
        try:
            if path.is_file() and _run_of(_read(path), path, checkpoint):
                return path
        except UserError:
            continue  # another program's report.json
    return None


def report_markdown(path: Path, checkpoint: Path) -> str:
    """Return summary, table and verdict of one checkpoint.

    Raises:
        UserError: if there is no report at `path`, or none of this checkpoint.
    """
    report = _read(path)
    run = _run_of(report, path, checkpoint)
    if run is None:
        raise UserError(f"{path} has no figures that are certainly of {checkpoint}; `python evaluate.py --checkpoint "
                        f"{checkpoint}` measures it")
    try:
        heading, *rows = table_rows(run["figures"])
        sentences = [f"- {printable(line)}" for line in [*run["verdict"], *run.get("notes", ())]]
        if (run.get("sampling") or {}).get("guide") not in (None, BY_TYPES):
            sentences.append("- The samples were guided away from an earlier network, which this model was exported "
                             "without; it draws less well than these figures say.")
        return "\n".join([printable(report["summary"]), "", markdown_table(heading, rows), "", *sentences])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a report of this version of evaluate.py ({first_line(error)}); run it "
                        f"again") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the report {path} ({first_line(error)}); name the report.json of an evaluate.py "
                        f"run") from error
    if not isinstance(report, dict) or not isinstance(report.get("runs"), list):
        raise UserError(f"{path} is no report of evaluate.py; name the report.json of one")
    return report


def _run_of(report: dict[str, Any], path: Path, checkpoint: Path) -> dict[str, Any] | None:
    """Return the run of a checkpoint in the report at `path`; None if it has none that is certainly of it.

    Its own path comes first. A report beside the checkpoint may have moved with it, and then the file's name is enough;
    elsewhere it says nothing, nor does one that several runs share: every training ends with a final_model.pt.
    """
    runs = [(Path(str(run.get("name"))), run) for run in report["runs"] if isinstance(run, dict)]
    exact = [run for name, run in runs if name.resolve() == checkpoint.resolve()]
    if exact:
        return exact[0]
    folder = checkpoint.resolve().parent
    beside = path.resolve().parent in (folder, folder / "evaluation")
    named = [run for name, run in runs if name.name == checkpoint.name]
    return named[0] if beside and len(named) == 1 else None
