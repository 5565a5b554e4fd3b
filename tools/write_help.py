"""Write the help text of every command to docs/help.

    python -m tools.write_help                     # after a change of any command's flags

tests/test_docs.py holds these files against what `--help` prints.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import sys
from pathlib import Path

from utils.files import write_text

FOLDER = Path(__file__).resolve().parents[1] / "docs/help"
WIDTH = 100
# What a user types after `python`, and the file in docs/help.
COMMANDS = {
    "train.py": "train.txt",
    "generate.py": "generate.txt",
    "evaluate.py": "evaluate.txt",
    "export.py": "export.txt",
    "unet.py": "unet.txt",
    "-m critters": "critters.txt",
    "-m tools.train_autoencoder": "train_autoencoder.txt",
    "-m tools.benchmark": "benchmark.txt",
    "-m tools.study": "study.txt",
    "-m tools.two_halves": "two_halves.txt",
    "-m tools.race": "race.txt",
    "-m tools.compare_samplers": "compare_samplers.txt",
    "-m tools.plot_consistency": "plot_consistency.txt",
    "-m tools.check_types": "check_types.txt",
    "-m tools.preview_data": "preview_data.txt",
    "-m tools.plot_forward": "plot_forward.txt",
    "-m tools.toy": "toy.txt",
    "-m tools.theory_figures": "theory_figures.txt",
    "-m tools.run_notebook": "run_notebook.txt",
}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for command, name in COMMANDS.items():
        write_text(FOLDER / name, help_text(command))
        print(f"wrote docs/help/{name}")


def help_text(command: str) -> str:
    """Return what `python COMMAND --help` prints, 100 columns wide."""
    module = importlib.import_module(module_name(command))
    printed = io.StringIO()
    argv, environment = sys.argv, dict(os.environ)
    sys.argv = [command.removeprefix("-m "), "--help"]
    os.environ.update(COLUMNS=str(WIDTH + 2), NO_COLOR="1")  # argparse keeps two columns free
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            module.main()
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
    return printed.getvalue()


def module_name(command: str) -> str:
    """Return the module whose main() a command runs: a script, a module, or a package's __main__."""
    if not command.startswith("-m "):
        return command.removesuffix(".py")
    name = command.removeprefix("-m ")
    spec = importlib.util.find_spec(name)
    return f"{name}.__main__" if spec is not None and spec.submodule_search_locations is not None else name


if __name__ == "__main__":
    main()
