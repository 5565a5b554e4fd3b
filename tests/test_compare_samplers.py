"""tools/compare_samplers.py through its command line, with a network that was not trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from critter_model import save_critter_model, save_other_model
from scripts import assert_one_line, call

from critters import TYPES
from models.pipeline import Pipeline
from reverse_diffusion import SAMPLERS
from tools import compare_samplers
from tools.compare_samplers import Variant, compared_variants

pytestmark = pytest.mark.usefixtures("own_folder")
RESULTS = Path("outputs/samplers.json")


@pytest.fixture
def few_steps(monkeypatch):
    """ddpm in 2 and 20 steps, and dpm++ in 2."""
    monkeypatch.setattr(compare_samplers, "SAMPLERS", {name: SAMPLERS[name] for name in ("ddpm", "dpm++")})
    monkeypatch.setattr(compare_samplers, "STEPS", {"ddpm": (2, 20)})
    monkeypatch.setattr(compare_samplers, "DEFAULT_STEPS", (2,))
    monkeypatch.setattr(compare_samplers, "VARIANTS", ())
    monkeypatch.setattr(compare_samplers, "BASELINE", ("ddpm", 20))


def compare(model: Path, *flags) -> int | str | None:
    return call(compare_samplers, "--checkpoint", model, "--num_images", 64, "--device", "cpu", *flags)


def rows() -> list[dict]:
    return json.loads(RESULTS.read_text())["rows"]


def test_a_stopped_comparison_continues(few_steps, tmp_path, monkeypatch, capsys):
    model = save_critter_model(tmp_path / "model.pt")
    with monkeypatch.context() as patch:
        patch.setattr(compare_samplers, "SAMPLERS", {"ddpm": SAMPLERS["ddpm"]})
        assert compare(model) == 0
    first = rows()
    assert [(row["sampler"], row["steps"]) for row in first] == [("ddpm", 2), ("ddpm", 20)]
    assert compare(model) == 0
    assert rows()[:2] == first and len(rows()) == 3  # what was measured before is kept
    table = Path("outputs/samplers.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + 3 + 1 and "| +0.0000 ± 0.0000 |" in table[3] and table[4].startswith("| `dpm++` | 2 |")
    assert Path("outputs/samplers.png").stat().st_size > 10_000
    # Samples of an untrained network are further from critters than other critters are.
    assert min(row["distances"][0] for row in rows()) > 2 * json.loads(RESULTS.read_text())["real"][0]
    capsys.readouterr()
    assert_one_line(compare(model, "--num_images", 65), capsys, "remove it, or give another --output")


def test_damaged_results_are_one_line(few_steps, tmp_path, capsys):
    model = save_critter_model(tmp_path / "model.pt")
    RESULTS.parent.mkdir()
    for content in ("{", "[]", "3", '{"made_with": {}}', '{"made_with": {}, "rows": [{}]}'):
        RESULTS.write_text(content)
        assert_one_line(compare(model), capsys, "samplers.json is damaged; remove it")


def test_types_may_have_any_order(few_steps, tmp_path, monkeypatch):
    """A data set in a folder has its types in alphabetical order; the types of sample i are those of critter i."""
    monkeypatch.setattr(compare_samplers, "STEPS", {"ddpm": (2,)})
    monkeypatch.setattr(compare_samplers, "BASELINE", ("ddpm", 2))
    distances = []
    for class_names in (TYPES, sorted(TYPES)):
        model = save_critter_model(tmp_path / "model.pt", class_names)
        assert compare(model) == 0
        distances.append([row["distances"] for row in rows()])
        RESULTS.unlink()
    assert np.allclose(*distances, rtol=1e-6)


def test_every_sampler_of_the_registry_is_compared(monkeypatch):
    assert [variant.name for variant in compared_variants()] == ["ddpm", "ddpm, beta", "ddim", "dpm++", "sde-dpm++"]
    names = {variant.sampler for variant in compared_variants()}
    assert names == {name for name in SAMPLERS if not SAMPLERS[name].tuned} and set(compare_samplers.STEPS) <= names
    assert all(set(variant.options) <= set(SAMPLERS[variant.sampler].options) for variant in compared_variants())
    assert any((variant.name, steps) == compare_samplers.BASELINE
               for variant in compared_variants() for steps in variant.steps)
    monkeypatch.setitem(SAMPLERS, "new", SAMPLERS["ddim"])
    assert Variant("new", "new", compare_samplers.DEFAULT_STEPS) in compared_variants()


def test_a_tuned_model_beside_the_one_before(few_steps, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_samplers, "SAMPLERS", SAMPLERS)
    monkeypatch.setattr(compare_samplers, "FEW_STEPS", (
        Variant("consistency", "consistency", (1, 2)), Variant("sde-dpm++", "sde-dpm++", (2,)),
        Variant("guided", "sde-dpm++", (3,), dict(guidance=3.0))))
    monkeypatch.setattr(compare_samplers, "FEW_STEPS_BASELINE", ("sde-dpm++", 2))
    monkeypatch.setattr(compare_samplers, "PAIRS", ((("consistency", 2), ("sde-dpm++", 2)),))
    before = save_critter_model(tmp_path / "before.pt")
    tuned = save_critter_model(tmp_path / "tuned.pt", objective="consistency", sampler="consistency", sample_steps=2)
    drawn, draw = [], Pipeline.sample
    monkeypatch.setattr(Pipeline, "sample", lambda pipeline, seeds, **options: drawn.append(
        (pipeline.tuned, options["sampler"], options["steps"], options.get("guidance", 1.0), seeds))
        or draw(pipeline, seeds, **options))
    assert compare(before, "--tuned", tuned) == 0
    assert drawn == [(name == "consistency", name, steps, guidance, range(64)) for name, steps, guidance in (
        ("consistency", 1, 1.0), ("consistency", 2, 1.0), ("sde-dpm++", 2, 1.0), ("sde-dpm++", 3, 3.0))]
    distances = {(row["sampler"], row["steps"]): row["distances"] for row in rows()}
    *table, _, line = Path("outputs/samplers.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + 4 + 1 and "±" in table[2] and table[2].startswith("| `consistency` | 1 |")
    difference = np.subtract(distances["consistency", 2], distances["sde-dpm++", 2])
    value, error = compare_samplers.with_error(difference)
    assert line == f"- `consistency` in 2 minus `sde-dpm++` in 2: {value:+.4f} ± {error:.4f}"
    capsys.readouterr()
    assert_one_line(compare(tuned), capsys, "tuned.pt is tuned to few steps", "--tuned the one after")
    assert_one_line(compare(before, "--tuned", before), capsys, "before.pt is not tuned to few steps")
    assert_one_line(compare(before), capsys, "remove it, or give another --output")  # the other comparison's results


def test_jackknife():
    """For a mean it gives the usual standard error."""
    x = np.random.default_rng(0).normal(size=compare_samplers.GROUPS)
    value, error = compare_samplers.with_error([x.mean(), *(np.delete(x, i).mean() for i in range(len(x)))])
    assert value == x.mean() and error == pytest.approx(x.std(ddof=1) / len(x) ** 0.5)


def test_models_that_cannot_be_compared(tmp_path, capsys):
    save_other_model(tmp_path / "other.pt")
    assert_one_line(compare("other.pt"), capsys, "other.pt is not a model of critters")
    save_critter_model(tmp_path / "model.pt")
    assert_one_line(compare("model.pt"), capsys, "model.pt has 20 timesteps, and 1000 steps are compared")
    assert_one_line(compare("model.pt", "--num_images", 63), capsys, "--num_images must be at least 64")
