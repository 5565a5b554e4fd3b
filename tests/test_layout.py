"""The layout of the repository, checked on the syntax trees: what is where, and which way imports go.

Every checker is a function of a folder, so that a planted error in a copy shows that it is found.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts import ROOT

ROOT_NAMES = {
    "README.md", "DIFFUSION_THEORY.md", "LICENSE", "requirements.txt", "requirements-dev.txt",
    "requirements-benchmark.txt", "requirements-evaluate.txt",
    "requirements-notebook.txt", "ruff.toml", ".ci", ".github", ".gitignore",
    "forward_diffusion.py", "unet.py", "reverse_diffusion.py", "train.py", "generate.py", "evaluate.py", "models",
    "training", "evaluation", "critters", "tools", "utils", "docs", "data", "outputs", "checkpoints", "tests",
}
OPTIONAL_NAMES = {"export.py", "web", "requirements-export.txt", "requirements-tensorboard.txt"}
IGNORED_NAMES = {".git", "__pycache__", ".venv", "venv", ".pytest_cache", ".ruff_cache"}  # without git to say so

# Which rooms a room may import from, beside itself. A room is a root module or a top-level folder; in tools it is a
# command. A dotted name is a single module.
LAYER_0 = {"utils", "forward_diffusion", "unet", "critters"}
LAYERS_0_TO_2 = LAYER_0 | {"reverse_diffusion", "models"}
LAYERS_0_TO_4 = LAYERS_0_TO_2 | {"training", "evaluation"}
MAY_IMPORT: dict[str, set[str]] = {
    "utils": set(), "forward_diffusion": set(), "unet": set(), "critters": set(),
    "reverse_diffusion": {"forward_diffusion"},
    "models": LAYER_0 | {"reverse_diffusion"},
    "training": LAYERS_0_TO_2,
    "evaluation": LAYERS_0_TO_2 | {"training.dataset", "training.labels", "training.augment"},
    "train": LAYERS_0_TO_4, "generate": LAYERS_0_TO_4, "evaluate": LAYERS_0_TO_4, "export": LAYERS_0_TO_4,
    "tools": LAYERS_0_TO_4, "web": LAYERS_0_TO_4,
}
NOT_FOR_GENERATE = ("training.loop", "training.step", "training.run_dir")  # not even through other modules

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70  # not for tests, some of which are long lists of cases


# ---------------------------------------------------------------------------------------------------------------------
# reading a source tree


def source_files(root: Path) -> list[Path]:
    """Return the Python files of a source tree, those of the tests among them."""
    environments = {path.parent for path in root.glob("*/pyvenv.cfg")}
    return [path for path in sorted(root.rglob("*.py"))
            if not IGNORED_NAMES & set(path.relative_to(root).parts) and not environments & set(path.parents)]


def modules(root: Path) -> dict[str, Path]:
    """Return the files of all modules but the tests, by their dotted names; a package goes by its folder's name."""
    found = {}
    for path in source_files(root):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] != "tests":
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> dict[str, dict[str, int]]:
    """Return for each module the modules of this tree that it imports, anywhere in it, and the first line of each."""
    known, tree = modules(root), {}
    for name, path in known.items():
        tree[name] = {}
        for imported, line in _imports_of(name, path, known):
            tree[name][imported] = min(line, tree[name].get(imported, line))
    return tree


def _imports_of(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Yield (imported module, line), also for imports within functions and import_module("a literal")."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        candidates: list[str] = []
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            candidates = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            function = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if function in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                candidates = [str(node.args[0].value)]
        for candidate in candidates:
            parts = candidate.split(".")
            while parts and ".".join(parts) not in known:  # from a.b import function: the module is a.b
                parts.pop()
            if parts:
                yield ".".join(parts), node.lineno


def room_of(module: str) -> str:
    """Return the room of a module: "utils" of utils.files, "tools.benchmark" of tools.benchmark.measure."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "tools" else parts[0]


# ---------------------------------------------------------------------------------------------------------------------
# checkers: each returns what is wrong, a line each


def misplaced_names(root: Path) -> list[str]:
    """List what is in the root but should not be, and what should be there but is not."""
    try:
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
        names = {path.split("/")[0] for path in tracked.stdout.split("\0") if path}
        names = {name for name in names if (root / name).exists()}
    except (OSError, subprocess.CalledProcessError):
        names = set()
    names = names or {path.name for path in root.iterdir()} - IGNORED_NAMES
    return ([f"{name} does not belong in the root" for name in sorted(names - ROOT_NAMES - OPTIONAL_NAMES)]
            + [f"{name} is missing" for name in sorted(ROOT_NAMES) if not (root / name).exists()])


def forbidden_imports(root: Path) -> list[str]:
    """List the imports that go against the direction of the layers."""
    wrong, tree = [], imports(root)
    for module, imported in tree.items():
        allowed = MAY_IMPORT.get(module.split(".")[0], set())
        for target, line in imported.items():
            same_room = room_of(target) == room_of(module)
            if not same_room and target not in allowed and target.split(".")[0] not in allowed:
                wrong.append(f"{module}:{line} imports {target}")
    for module in sorted(reachable("generate", tree) & set(NOT_FOR_GENERATE)):
        wrong.append(f"generate needs {module}")
    return wrong


def reachable(start: str, tree: dict[str, dict[str, int]]) -> set[str]:
    """Return all modules that importing `start` imports, through any number of others and their packages."""
    found, queue = set(), [start]
    while queue:
        module = queue.pop()
        for target in tree.get(module, {}):
            parts = target.split(".")
            for name in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):  # a.b also runs a/__init__.py
                if name in tree and name not in found:
                    found.add(name)
                    queue.append(name)
    return found


def import_cycles(root: Path) -> list[str]:
    """List a cycle of imports, in their order, for each module at which one was found."""
    tree, done, cycles = imports(root), set(), []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            cycles.append(" -> ".join([*path[path.index(module):], module]))
        elif module not in done:
            for target in tree[module]:
                visit(target, [*path, module])
            done.add(module)

    for module in tree:
        visit(module, [])
    return cycles


def too_long(root: Path) -> list[str]:
    """List the files and, but for the tests, the functions with too many lines."""
    wrong = []
    for path in source_files(root):
        name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            wrong.append(f"{name} has {lines} lines")
        if name.startswith("tests/"):
            continue
        for node in ast.walk(ast.parse(text, name)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES:
                    wrong.append(f"{name}: {node.name} has {lines} lines")
    return wrong


def shadowed_names(root: Path) -> list[str]:
    """List the root's modules and folders that hide a module of the standard library."""
    taken = sys.stdlib_module_names | {"profiling"}  # of Python 3.15
    return sorted({module.split(".")[0] for module in modules(root)} & taken)


CHECKERS = (misplaced_names, forbidden_imports, import_cycles, too_long, shadowed_names)


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
def test_the_repository(checker):
    assert checker(ROOT) == []


def test_every_room_has_a_place_in_the_table():
    rooms = {module.split(".")[0] for module in modules(ROOT)}
    assert rooms <= MAY_IMPORT.keys(), rooms - MAY_IMPORT.keys()
    assert rooms >= MAY_IMPORT.keys() - {"export", "web"}
    assert imports(ROOT)["reverse_diffusion"].keys() == {"forward_diffusion"} and imports(ROOT)["unet"] == {}


# ---------------------------------------------------------------------------------------------------------------------
# planted errors


SMALL_TREE = {
    "forward_diffusion.py": "import torch\n", "unet.py": "", "utils/__init__.py": "", "utils/files.py": "import os\n",
    "utils/images.py": "from utils.files import replacing\n", "critters/shapes.py": "",
    "critters/__init__.py": "from critters.draw import draw\n", "critters/draw.py": "from . import shapes\n",
    "reverse_diffusion.py": "from forward_diffusion import NoiseScheduler\n",
    "models/__init__.py": "", "models/pipeline.py": "import reverse_diffusion\nfrom utils import images\n",
    "training/__init__.py": "", "training/dataset.py": "import critters\n", "training/labels.py": "",
    "training/step.py": "", "training/loop.py": "from training.step import step\nimport models.pipeline\n",
    "evaluation/__init__.py": "", "evaluation/data.py": "from training import dataset\n",
    "train.py": "from training.loop import loop\n", "evaluate.py": "import evaluation.data\n",
    "generate.py": "from training.labels import parse_types\n",
    "tools/__init__.py": "", "tools/preview_data.py": "from training.dataset import ImageFolder\n",
    "tools/benchmark/__init__.py": "", "tools/benchmark/tables.py": "",
    "tools/benchmark/__main__.py": "from tools.benchmark.tables import table\nimport evaluation.data\n",
    "tests/test_train.py": "import train\nfrom tools import preview_data\n",
}


def write_tree(root: Path, **changed: str) -> Path:
    for name, text in (SMALL_TREE | changed).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("checker", CHECKERS[1:], ids=lambda checker: checker.__name__)
def test_a_tree_without_errors(tmp_path, checker):
    assert checker(write_tree(tmp_path)) == []


@pytest.mark.parametrize("name, text, found", [
    ("forward_diffusion.py", "import torch\nimport utils.files\n", "forward_diffusion:2 imports utils.files"),
    ("unet.py", "from forward_diffusion import x\n", "unet:1 imports forward_diffusion"),
    ("utils/files.py", "def f():\n    from training.loop import g\n", "utils.files:2 imports training.loop"),
    ("utils/files.py", "import critters as c\n", "utils.files:1 imports critters"),
    ("critters/draw.py", "from utils import files\n", "critters.draw:1 imports utils.files"),
    ("reverse_diffusion.py", "import models.pipeline\n", "reverse_diffusion:1 imports models.pipeline"),
    ("reverse_diffusion.py", "from utils.files import x\n", "reverse_diffusion:1 imports utils.files"),
    ("models/pipeline.py", "import training.dataset\n", "models.pipeline:1 imports training.dataset"),
    ("models/pipeline.py", "from training import dataset\n", "models.pipeline:1 imports training.dataset"),
    ("models/pipeline.py", "from training import *\n", "models.pipeline:1 imports training"),
    ("training/dataset.py", "import evaluation.data\n", "training.dataset:1 imports evaluation.data"),
    ("training/dataset.py", "import importlib\nimportlib.import_module('train')\n", "training.dataset:2 imports train"),
    ("evaluation/data.py", "from training.loop import x\n", "evaluation.data:1 imports training.loop"),
    ("evaluation/data.py", "from ..training import step\n", "evaluation.data:1 imports training.step"),
    ("evaluation/data.py", "from training import x\n", "evaluation.data:1 imports training"),
    ("evaluate.py", "import generate\n", "evaluate:1 imports generate"),
    ("train.py", "if True:\n    import tools.preview_data\n", "train:2 imports tools.preview_data"),
    ("tools/preview_data.py", "import train\n", "tools.preview_data:1 imports train"),
    ("tools/preview_data.py", "from tools import benchmark\n", "tools.preview_data:1 imports tools.benchmark"),
    ("tools/benchmark/tables.py", "from .. import preview_data\n", "benchmark.tables:1 imports tools.preview_data"),
    ("generate.py", "import training.run_dir\n", "generate needs training.run_dir"),
    ("generate.py", "def f():\n    from training import loop\n", "generate needs training.loop"),
    ("training/labels.py", "from training.step import x\n", "generate needs training.step"),
    ("training/__init__.py", "import training.loop\n", "generate needs training.loop"),
])
def test_a_planted_import_is_found(tmp_path, name, text, found):
    assert found in "\n".join(forbidden_imports(write_tree(tmp_path, **{"training/run_dir.py": "", name: text})))


@pytest.mark.parametrize("changed, found", [
    ({"utils/files.py": "import utils.images\n"}, "utils.images -> utils.files -> utils.images"),
    ({"utils/files.py": "def f():\n    from . import images\n"}, "utils.images -> utils.files -> utils.images"),
    ({"critters/shapes.py": "import critters\n"}, "critters -> critters.draw -> critters.shapes -> critters"),
    ({"unet.py": "import unet\n"}, "unet -> unet"),
])
def test_a_planted_cycle_is_found(tmp_path, changed, found):
    assert found in import_cycles(write_tree(tmp_path, **changed))


def test_planted_long_files_and_functions_are_found(tmp_path):
    long = "def {}():\n" + "    pass\n" * MAX_FUNCTION_LINES
    assert too_long(write_tree(tmp_path, **{
        "unet.py": "class A:\n" + "".join(f"    {line}\n" for line in long.format("method").splitlines()),
        "tools/preview_data.py": "async " + long.format("f"), "training/loop.py": "\n" * (MAX_FILE_LINES + 1),
        "tests/test_train.py": long.format("test") + "\n" * MAX_FILE_LINES, "utils/files.py": "\n" * MAX_FILE_LINES,
        "utils/images.py": long.format("f").replace("    pass\n", "", 1),
    })) == ["tests/test_train.py has 471 lines", "tools/preview_data.py: f has 71 lines",
            "training/loop.py has 401 lines", "unet.py: method has 71 lines"]


def test_planted_names_are_found(tmp_path):
    write_tree(tmp_path, **{"profiling.py": "", "logging/__init__.py": "", "utils/json.py": ""})
    assert shadowed_names(tmp_path) == ["logging", "profiling"]
    wrong = misplaced_names(tmp_path)
    assert "profiling.py does not belong in the root" in wrong and "README.md is missing" in wrong
    assert not any(name.startswith(("unet.py", "utils ")) for name in wrong)
