"""The documentation: links, anchors, commands, help texts and sizes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from pages import FENCE, LINK, PAGES, anchors, prose
from PIL import Image
from scripts import ROOT

from tools.write_help import COMMANDS, FOLDER, help_text

LARGEST_IMAGE = 500_000  # bytes
# Beginnings of a command line that runs something of this repository; the command itself is what follows.
RUNNERS = re.compile(r"(?:^|(?<=[\s`&$(]))(?:\.venv/bin/)?(?:python3?|torchrun)\s+(.*)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def command_lines(page: Path) -> list[list[str]]:
    """The words of each command on a page that runs Python, from after `python` or `torchrun` on."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    pieces = [line for block in FENCE.findall(text) if not block.startswith("```python") for line in block.splitlines()]
    pieces += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    commands = []
    for piece in pieces:
        for part in piece.split("&&"):
            match = RUNNERS.search(part)
            if match:
                commands.append(shlex.split(match[1].replace("...", ""), comments=True))
    return commands


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The command, as in `COMMANDS`, and its words; None for one that is not of this repository."""
    for i, word in enumerate(words):
        if word == "-m" and i + 1 < len(words):
            return f"-m {words[i + 1]}", words[i + 2 :]
        if word.endswith(".py"):
            return word, words[i + 1 :]
        if not word.startswith("-"):
            return None
    return None


@pages
def test_links_and_anchors_resolve(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        assert path.is_relative_to(ROOT), f"{page.name} links to {target}, outside of the repository"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}, which has no such heading"


@pages
def test_the_commands_exist_and_know_their_flags(page):
    for words in command_lines(page):
        script = script_of(words)
        if script is None or script[0] in ("-m venv", "-m pytest", "-m http.server"):
            continue
        command, arguments = script
        file = ROOT / f"{command.removeprefix('-m ').removesuffix('.py').replace('.', '/')}.py"
        assert file.is_file() or (file.with_suffix("") / "__main__.py").is_file(), f"{page.name} runs python {command}"
        if command not in COMMANDS:
            continue
        known = set(re.findall(r"--\w+", help_text(command)))
        unknown = {word.split("=")[0] for word in arguments if re.match(r"--\w", word)} - known
        assert not unknown, f"{page.name}: python {command} has no {', '.join(sorted(unknown))}"


@pages
def test_the_files_that_a_page_names_exist(page):
    for name in re.findall(r"`((?:[\w.]+/)*\w+\.py)`", prose(page)):
        assert (ROOT / name).is_file(), f"{page.name} names {name}"
    rooms = "docs|tests|tools|training|models|evaluation|utils|critters"
    for name in re.findall(rf"`((?:{rooms})/(?:\w+/)*)`", prose(page)):
        assert (ROOT / name).is_dir(), f"{page.name} names {name}"


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    assert len(text.split()) <= 2500


def test_the_images_are_small_and_used():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for path in (ROOT / "docs/images").iterdir():
        assert path.stat().st_size < LARGEST_IMAGE, path.name
        assert f"images/{path.name}" in text, f"no page shows {path.name}"


def test_the_python_of_the_readme_runs(own_folder):
    Path("outputs").mkdir()
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.M)
    block = block.replace("16", "2").replace("checkpoints/", f"{(ROOT / 'checkpoints').as_posix()}/")
    exec(compile(block.replace("guidance=3.0", "guidance=3.0, steps=2"), "README.md", "exec"), {})
    darkest, brightest = Image.open("outputs/fire_flying.png").convert("L").getextrema()
    assert darkest < 128 < brightest


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_texts_are_those_of_the_commands(command):
    text = help_text(command)
    assert text.startswith("usage: ")
    stored = (FOLDER / COMMANDS[command]).read_text(encoding="utf-8")
    assert text == stored, "the flags have changed: run python -m tools.write_help"


def test_no_help_text_is_left_over():
    assert {path.name for path in FOLDER.iterdir()} == set(COMMANDS.values())
