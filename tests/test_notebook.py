"""docs/pokediff.ipynb as it is committed, and tools/run_notebook.py, which renders it.

.ci/run executes all of its cells in their short form. Here is what needs no kernel, and what the command refuses.
"""

from __future__ import annotations

import ast
import base64
import importlib
import io
import json
import re
import shlex
import sys

import pytest
import torch
from pages import LINK, anchors
from PIL import Image
from scripts import ROOT, assert_one_line, call

from tools import run_notebook
from tools.write_help import COMMANDS, help_text

NOTEBOOK = ROOT / "docs/pokediff.ipynb"
LARGEST = 500_000  # bytes
BOOK = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CODE = [cell for cell in BOOK["cells"] if cell["cell_type"] == "code"]
PROSE = "\n\n".join("".join(cell["source"]) for cell in BOOK["cells"] if cell["cell_type"] == "markdown")
SHELL = re.compile(r"^(\s*)!(.*)$", re.MULTILINE)


def source(cell: dict) -> str:
    """Return the code of a cell, each command of the shell on one line."""
    return "".join(cell["source"]).replace("\\\n", " ")


def tree(cell: dict) -> ast.Module:
    """Return the syntax tree of a cell, with `pass` in the place of each command of the shell."""
    return ast.parse(SHELL.sub(r"\1pass", source(cell)))


def strings(value: object) -> list[str]:
    """Return all strings in a JSON value."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in inner for text in strings(part)]


# ---------------------------------------------------------------------------------------------------------------------
# the committed notebook


def test_it_is_rendered_from_top_to_bottom():
    assert BOOK["nbformat"] == 4 and len({cell["id"] for cell in BOOK["cells"]}) == len(BOOK["cells"])
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    for cell in CODE:
        kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
        if isinstance(tree(cell).body[-1], ast.Expr) and "print" not in source(cell).splitlines()[-1]:
            assert kinds & {"image/png", "image/jpeg"}, f"shows no picture: {source(cell)}"
        if "print(" in source(cell) or re.search(r"^ *!\{python\}", source(cell), re.MULTILINE):
            assert any(output["output_type"] == "stream" for output in cell["outputs"]), source(cell)


def test_its_pictures_can_be_read():
    for cell in CODE:
        for output in cell["outputs"]:
            for kind, data in output.get("data", {}).items():
                if kind.startswith("image/"):
                    image = Image.open(io.BytesIO(base64.b64decode("".join(data))))
                    assert image.width <= run_notebook.WIDEST and image.get_format_mimetype() == kind


def test_it_is_small_and_tells_nothing_of_a_machine():
    assert NOTEBOOK.stat().st_size < LARGEST
    assert all(cell["metadata"] == {} for cell in BOOK["cells"])
    assert set(BOOK["metadata"]) == {"kernelspec", "language_info"}
    assert BOOK["metadata"]["language_info"] == {"name": "python"}
    texts = [text for cell in BOOK["cells"] for text in strings({**cell, "outputs": [
        output if output["output_type"] == "stream" else {kind: data for kind, data in output.get("data", {}).items()
                                                          if not kind.startswith("image/")}
        for output in cell.get("outputs", ())]})]
    assert [text for text in texts if run_notebook.FOREIGN.search(text)] == []
    assert not re.search(r"\r|\x1b", "".join(texts))


def test_its_links_lead_somewhere():
    targets = LINK.findall(PROSE)
    assert len(targets) > 20
    for target in targets:
        if not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            path = (NOTEBOOK.parent / name).resolve()
            assert path.exists() and path.is_relative_to(ROOT), target
            assert not anchor or anchor in anchors(path), target


def test_it_defines_nothing_and_imports_what_exists():
    for cell in CODE:
        for node in ast.walk(tree(cell)):
            assert not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)), source(cell)
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_its_commands_exist_and_know_their_flags():
    lines = [line for cell in CODE for _, line in SHELL.findall(source(cell)) if not line.startswith("git ")]
    assert len(lines) >= 8
    for line in lines:
        python, *words = shlex.split(re.sub(r"\{[^}]*\}", "VALUE", line))
        command = f"-m {words[1]}" if words[0] == "-m" else words[0]
        assert python == "VALUE" and command in COMMANDS, line
        unknown = set(re.findall(r"--\w+", line)) - set(re.findall(r"--\w+", help_text(command)))
        assert not unknown, f"{command} has no {unknown}"


def test_it_writes_to_its_own_folders():
    flag = re.compile(r"--(?:output|run_name) \"?(\S+?)\"?(?:\s|$)")
    written = [name for cell in CODE for name in flag.findall(source(cell))]
    assert len(written) >= 6 and all(name.startswith(("{OUT}", "{RUN}", "{mine}")) for name in written), written


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Return a function that puts a notebook of these cells in the place of ours, and the file to render it to."""
    monkeypatch.setattr(run_notebook, "NOTEBOOK", tmp_path / "small.ipynb")

    def write(*cells):
        nbformat = pytest.importorskip("nbformat")
        pytest.importorskip("nbclient")
        pytest.importorskip("ipykernel")
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        nbformat.write(book, tmp_path / "small.ipynb")
        return tmp_path / "out/rendered.ipynb"

    return write


def test_what_cannot_be_written_is_one_line(tmp_path, capsys):
    assert_one_line(call(run_notebook, "--output", "a.txt"), capsys, "must name a file that ends in .ipynb", "a.txt")
    (tmp_path / "b.ipynb").mkdir()
    assert_one_line(call(run_notebook, "--output", tmp_path / "b.ipynb"), capsys, "must name a file")


@pytest.mark.parametrize("package", ["ipykernel", "nbclient", "nbformat"])
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys, package):
    for name in ("ipykernel", "nbclient", "nbformat"):
        monkeypatch.setitem(sys.modules, name, None if name == package else torch)  # present, whatever it is
    code = call(run_notebook, "--output", tmp_path / "a.ipynb")
    assert_one_line(code, capsys, f"needs the package {package}, which is not installed: pip install -r "
                                  f"requirements-notebook.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cell, told", [
    ("print('before')\n1 / 0", "ZeroDivisionError: division by zero"),
    ("print('before', flush=True)\nimport os, time\ntime.sleep(1)\nos._exit(1)", "died"),
    ("print('before')\n%run missing.py", "missing.py"),
])
def test_a_cell_that_fails_ends_the_command(small, capsys, cell, told):
    output = small("a = 1", cell, "print('after')")
    output.parent.mkdir()
    output.write_text("what stood here")
    code = call(run_notebook, "--output", output)
    assert isinstance(code, str) and code.startswith("error: cell 2 of 3") and told in code and "\n" not in code
    printed = capsys.readouterr().out
    assert "before" in printed and "after" not in printed
    assert output.read_text() == "what stood here" and [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_file_that_is_no_notebook_is_one_line(small, tmp_path, capsys):
    output = small("1")
    (tmp_path / "small.ipynb").write_text("{}")
    assert_one_line(call(run_notebook, "--output", output), capsys, "small.ipynb", "no notebook")
    assert not output.exists()


@pytest.mark.parametrize("short", [True, False])
def test_a_notebook_is_rendered_small_and_clean(small, capsys, short):
    output = small("import os, sys\nprint('short', repr(os.environ.get('POKEDIFF_SHORT')))",
                   f"print('1 %\\r50 %\\rdone', '\\x1b[31m', {str(ROOT / 'docs')!r})",
                   "from PIL import Image\nImage.linear_gradient('L').resize((1600, 400))")
    assert call(run_notebook, "--output", output, *["--short"] * short) == 0
    book = json.loads(output.read_text())
    first, second, third = (cell["outputs"][0] for cell in book["cells"])
    assert "".join(first["text"]) == f"short {'1' if short else ''!r}\n"
    assert "".join(second["text"]) == "done  docs\n"
    (kind, data), = third["data"].items()
    image = Image.open(io.BytesIO(base64.b64decode("".join(data))))
    assert image.size == (540, 135) and image.get_format_mimetype() == kind
    assert all(cell["metadata"] == {} for cell in book["cells"])
    assert [cell["execution_count"] for cell in book["cells"]] == [1, 2, 3]
    assert "wrote" in capsys.readouterr().out


def test_a_path_of_the_machine_is_refused(small, capsys):
    output = small("print('/home/somebody/secret.txt')")
    code = call(run_notebook, "--output", output)
    assert "shows a path of this machine" in code and not output.exists()


def test_progress_bars_end_as_a_terminal_shows_them():
    assert run_notebook.tidy_text("a\r\n 10 %\r 20 %\rb\n\n\n\nc\r\n") == "a\nb\n\nc\n"


@pytest.mark.parametrize("noisy", [True, False], ids=["noise", "two colours"])
def test_an_image_takes_the_format_of_fewer_bytes(noisy):
    image = torch.randint(256, (120, 200, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if not noisy:
        image = 255 * (image[..., :1] > 127).expand(-1, -1, 3).to(torch.uint8)  # black and white
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, "PNG")
    kind, data = run_notebook.shrink(buffer.getvalue())
    assert kind == ("image/jpeg" if noisy else "image/png") and len(data) < len(buffer.getvalue())
    assert Image.open(io.BytesIO(data)).size == (200, 120)
