"""tools/check_types.py through its command line, with a network that was not trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from critter_model import save_critter_model, save_other_model
from scripts import assert_one_line, call

from critters import TYPES, draw_critter
from critters.recognizer import CritterRecognizer
from models.pipeline import Pipeline
from tools import check_types

pytestmark = pytest.mark.usefixtures("own_folder")
FEW = ("--num_images", 2, "--num_pairs", 1, "--steps", 2, "--device", "cpu")


def percentages(output: str) -> dict[str, float]:
    """The numbers of a report by what they are of."""
    rows = [line.split(maxsplit=1) for line in output.splitlines() if line.startswith(" ")]
    return {name: float(number) for number, name in rows}


@pytest.fixture(scope="module")
def recognizer() -> CritterRecognizer:
    return CritterRecognizer(16, count=300)


@pytest.fixture(autouse=True)
def one_recognizer(recognizer, monkeypatch):
    """It is fitted once for all of these tests."""
    monkeypatch.setattr(check_types, "CritterRecognizer", lambda image_size: recognizer)


@pytest.fixture
def program_draws(monkeypatch):
    """Samples are critters that the program draws, of the types that the labels request."""
    def sample(self, seeds, *, labels, **_):
        names = [tuple(self.class_names[i] for i in row.nonzero().flatten()) for row in labels]
        images = [np.asarray(draw_critter(seed, 16, 99, types)[0]) for seed, types in zip(seeds, names)]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1

    monkeypatch.setattr(Pipeline, "sample", sample)


def test_an_untrained_network(tmp_path, capsys):
    assert call(check_types, "--checkpoint", save_critter_model(tmp_path / "model.pt"), *FEW) == 0
    output = capsys.readouterr().out
    found = percentages(output)
    assert output.startswith("dpm++, 2 steps, guidance 3 (types)\n")
    assert set(TYPES) < set(found) and len(found) == 10 + 1 + 3
    assert np.mean([found[name] for name in TYPES]) < 50  # the network draws noise, so one in ten is luck
    assert "mean of all 45 pairs" in found


@pytest.mark.parametrize("class_names", [TYPES, sorted(TYPES), TYPES[::-1]])
def test_types_may_have_any_order(class_names, program_draws, tmp_path, capsys):
    """A data set in a folder has its types in alphabetical order, and other ones in yet another."""
    model = save_critter_model(tmp_path / "model.pt", class_names)
    assert call(check_types, "--checkpoint", model, *FEW) == 0
    found = percentages(capsys.readouterr().out)
    assert np.mean([found[name] for name in TYPES]) >= 90 and found["mean of all 45 pairs"] >= 90


def test_guidance_is_off_without_label_dropout(tmp_path, capsys):
    model = save_critter_model(tmp_path / "model.pt", label_dropout=0.0)
    assert call(check_types, "--checkpoint", model, *FEW) == 0
    assert capsys.readouterr().out.startswith("dpm++, 2 steps, guidance 1\n")
    assert_one_line(call(check_types, "--checkpoint", model, *FEW, "--guidance", 2), capsys, "--label_dropout 0")


def test_a_model_of_something_else_is_refused(tmp_path, capsys):
    save_other_model(tmp_path / "other.pt")
    assert_one_line(call(check_types, "--checkpoint", "other.pt", "--device", "cpu"), capsys,
                    "other.pt is not a model of critters with their types; train one: python train.py --preset quick")


@pytest.mark.parametrize("flags, words", [
    (["--steps", "21"], ["--steps", "1 ... 20"]), (["--steps", "0"], ["--steps"]),
    (["--num_pairs", "0"], ["--num_pairs"]), (["--seed", "-1"], ["--seed"]),
    (["--guidance", "nan"], ["--guidance", "finite"])])
def test_bad_flags(flags, words, tmp_path, capsys):
    save_critter_model(tmp_path / "model.pt")
    assert_one_line(call(check_types, "--checkpoint", "model.pt", "--num_images", 1, "--device", "cpu", *flags), capsys,
                    *words)
