"""Settings as command lines: kinds of values, ranges, several values, switches, positional ones, errors, help."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from utils.cli import (
    MAX_SEED,
    add_settings,
    check_ranges,
    check_sub_folder,
    device_setting,
    field_of,
    given_settings,
    parse,
    precision_setting,
    seed_setting,
    setting,
    with_default,
)
from utils.errors import one_line_errors


@dataclass
class Settings:
    image: str = setting("", "image to read", positional=True)
    count: int = setting(64, "number of images", above=0)
    fraction: float = setting(0.5, "a fraction of 100 %", above=0, most=1)
    decay: float = setting(0.9, "factor", least=0, below=1)
    guidance: float | None = setting(None, "guidance scale (default: 3)", kind=float)
    folder: Path = setting(Path("outputs"), "folder to write to")
    mode: str = setting("full", "which mode", ("full", "none"))
    multipliers: tuple[int, ...] = setting((1, 2, 4), "of the width", above=0)
    ends: tuple[int, int] | None = setting(None, "two seeds", kind=int, count=2, metavar=("A", "B"), least=0)
    gif: bool = setting(False, "also write a GIF")
    grid: bool = setting(True, "write a grid")
    seed: int = seed_setting("random seed")
    device: str = device_setting()
    precision: str = precision_setting()


def parsed(monkeypatch, *flags, settings=Settings):
    monkeypatch.setattr(sys, "argv", ["tool.py", *map(str, flags)])
    return parse(settings, "A tool.", "python tool.py")


def test_without_flags_every_setting_has_its_default(monkeypatch):
    assert parsed(monkeypatch) == Settings()
    assert Settings().multipliers == (1, 2, 4) and Settings().image == "" and Settings().device == "auto"


def test_values_have_the_type_of_their_setting(monkeypatch):
    settings = parsed(monkeypatch, "cat.png", "--count", 3, "--fraction", 1, "--guidance", -2, "--folder", "a/b",
                      "--mode", "none", "--multipliers", 1, 2, "--ends", 5, 7, "--gif", "--seed", 9)
    assert settings == Settings("cat.png", 3, 1.0, 0.9, -2.0, Path("a/b"), "none", (1, 2), (5, 7), True, seed=9)
    kinds = [type(getattr(settings, name)) for name in ("count", "fraction", "guidance", "folder", "gif", "ends")]
    assert isinstance(settings.folder, Path) and kinds == [int, float, float, type(Path()), bool, tuple]


def test_a_switch_that_is_on_can_be_turned_off(monkeypatch):
    assert parsed(monkeypatch).grid and parsed(monkeypatch, "--grid").grid
    assert not parsed(monkeypatch, "--no_grid").grid


def test_a_positional_setting_may_stand_anywhere(monkeypatch):
    assert parsed(monkeypatch, "--gif", "cat.png").image == "cat.png"

    @dataclass
    class Several:
        names: tuple[str, ...] = setting((), "parts to run", kind=str, positional=True, count="*")

    assert parsed(monkeypatch, settings=Several).names == ()
    assert parsed(monkeypatch, "a", "b", settings=Several).names == ("a", "b")


@pytest.mark.parametrize("flags, message", [
    (["--count", "0"], "--count must be more than 0, not 0"),
    (["--fraction", "0"], "--fraction must be more than 0 and at most 1, not 0.0"),
    (["--fraction", "1.01"], "--fraction must be more than 0 and at most 1, not 1.01"),
    (["--decay", "-0.1"], "--decay must be at least 0 and less than 1, not -0.1"),
    (["--decay", "1"], "--decay must be at least 0 and less than 1, not 1.0"),
    (["--guidance", "nan"], "--guidance must be a finite number, not nan"),
    (["--guidance", "inf"], "--guidance must be a finite number, not inf"),
    (["--multipliers", "1", "0", "2"], "--multipliers must be more than 0, not 0"),
    (["--ends", "3", "-1"], "--ends must be at least 0, not -1"),
    (["--seed", "-1"], f"--seed must be at least 0 and at most {MAX_SEED}, not -1"),
    (["--seed", str(2**62)], f"--seed must be at least 0 and at most {MAX_SEED}, not {2**62}"),
])
def test_a_value_out_of_its_range(monkeypatch, flags, message):
    with pytest.raises(ValueError) as error:
        parsed(monkeypatch, *flags)
    assert str(error.value) == message
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        parsed(monkeypatch, *flags)
    assert stopped.value.code == f"error: {message}"


def test_the_ends_of_a_range(monkeypatch):
    settings = parsed(monkeypatch, "--count", 1, "--fraction", 1, "--decay", 0, "--ends", 0, 0, "--seed", MAX_SEED)
    assert settings == Settings(count=1, fraction=1.0, decay=0.0, ends=(0, 0), seed=MAX_SEED)


def test_check_ranges_is_for_settings_from_elsewhere_too():
    check_ranges(Settings())
    with pytest.raises(ValueError, match="--count must be more than 0, not -3"):
        check_ranges(Settings(count=-3))
    check_ranges(Settings(gif=True))  # a switch is no number


@pytest.mark.parametrize("flags, words", [
    (["--count", "many"], ["--count", "'many'"]), (["--count", "1.5"], ["--count", "'1.5'"]),
    (["--count"], ["--count"]), (["--mode", "half"], ["--mode", "'half'", "full", "none"]),
    (["--ends", "3"], ["--ends"]), (["--nonsense", "1"], ["--nonsense"]), (["--precision", "fp8"], ["--precision"]),
    (["a.png", "b.png"], ["b.png"]), (["--gif", "yes", "no"], ["no"]),
    (["--coun", "3"], ["--coun"]),  # no abbreviations: a new flag would change what they mean
])
def test_a_flag_that_cannot_be_parsed_is_one_line(monkeypatch, capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        parsed(monkeypatch, *flags)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and line.startswith("error: ") and line.endswith("; see python tool.py --help")
    assert all(word in line for word in words), line


def help_text(monkeypatch, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        parsed(monkeypatch, "--help")
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_flag_with_its_default(monkeypatch, capsys):
    text = help_text(monkeypatch, capsys)
    assert text.startswith("usage: python tool.py [flags]\n\nA tool.\n")
    assert max(len(line) for line in text.splitlines()) <= 100
    words = " ".join(text.split())
    for line in ("--count COUNT number of images (default: 64)", "FRACTION a fraction of 100 % (default: 0.5)",
                 "--guidance GUIDANCE guidance scale (default: 3) -", "FOLDER folder to write to (default: outputs)",
                 "--mode {full,none} which mode (default: full)", "of the width (default: 1 2 4)",
                 "--ends A B two seeds -", "--gif also write a GIF -", "--seed SEED random seed (default: 0)"):
        assert line in f"{words} -", line
    assert "image to read" in words and "SUPPRESS" not in text


def test_help_is_the_same_in_every_terminal(monkeypatch, capsys):
    texts = []
    for columns in ("20", "80", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        texts.append(help_text(monkeypatch, capsys))
    assert texts[0] == texts[1] == texts[2]


def test_a_setting_of_another_command_with_a_default_of_its_own(monkeypatch):
    @dataclass
    class Other:
        count: int = with_default(Settings, "count", 5)

    assert parsed(monkeypatch, settings=Other).count == 5
    assert field_of(Other, "count").metadata == field_of(Settings, "count").metadata
    with pytest.raises(ValueError, match="--count must be more than 0, not 0"):
        parsed(monkeypatch, "--count", 0, settings=Other)


def test_given_settings_are_those_on_the_command_line(monkeypatch):
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    add_settings(parser, Settings)
    monkeypatch.setattr(sys, "argv", ["tool.py", "--multipliers", "1", "--count", "64"])
    assert given_settings(parser) == dict(multipliers=(1,), count=64)  # also where it is the default


@pytest.mark.parametrize("name", ["", "name", "a/b", "two words"])
def test_names_of_sub_folders(name):
    check_sub_folder("--run_name", name)


@pytest.mark.parametrize("name", ["..", "../a", "a/../../b", str(Path.home().absolute())])
def test_names_that_lead_elsewhere(name):
    with pytest.raises(ValueError, match="--run_name must be the name of a sub-folder"):
        check_sub_folder("--run_name", name)
