"""What the report says of figures that are made up."""

import copy
import json
from pathlib import Path

import pytest
import torch

from evaluation.meanings import format_figure
from evaluation.measure import Measurement
from evaluation.report import _as_dict, epoch_to_keep, table, verdict
from evaluation.report_markdown import find_report, report_markdown
from utils.errors import UserError


def figure(value: float, low: float, high: float) -> dict:
    return dict(value=value, low=low, high=high)


def measurement(epoch: int, copies: tuple[float, float, float], distance: float) -> Measurement:
    real = figure(0.8, 0.75, 0.85)
    figures = dict(
        copies=figure(*copies), wasserstein=figure(distance, distance - 0.01, distance + 0.01),
        precision={**figure(0.6, 0.55, 0.65), "real": real}, tilt={**figure(9, 8.5, 9.5), "real": figure(7, 6.8, 7.2)},
        brightness={**figure(0.5, 0.4, 0.6), "real": figure(0.5, 0.49, 0.51)},
    )
    return Measurement("a.pt", epoch, "critters", torch.empty(1000, 0), copies=dict(alarm=0.01), figures=figures)


def test_the_verdict_follows_the_figures():
    honest, copying = measurement(1, (0.012, 0.007, 0.02), 0.1), measurement(2, (0.2, 0.18, 0.22), 0.05)
    text = " ".join(verdict(honest))
    assert "does not copy training images: 12 of 1,000" in text and "about 10 are expected by chance" in text
    assert "A smaller fraction of samples than of real images looks real (precision 60.0 %, real images 80.0 %)" in text
    assert "differ from the data in: tilt in degrees." in text
    assert "The model copies training images: 200 of 1,000" in " ".join(verdict(copying))
    few = copy.deepcopy(honest)
    few.figures["copies"] = figure(0, 0, 0.05)
    assert "No copying is evident" in " ".join(verdict(few))


def test_copies_are_excused_if_unseen_images_count_as_copies_as_often():
    alike = measurement(2, (0.2, 0.18, 0.22), 0.05)
    alike.figures["copies"]["real"] = figure(0.2, 0.18, 0.22)
    assert "The model copies" not in " ".join(verdict(alike))


@pytest.mark.parametrize("low, text", [(0.01, "0.050 bits per value more"), (-0.01, "no sign of memorisation")])
def test_a_gap_beyond_its_error_is_a_sign_of_memorisation(low, text):
    model = Measurement("a.pt", figures=dict(bits_gap=figure(0.05, low, 0.09)))
    assert text in " ".join(verdict(model))


@pytest.mark.parametrize("low, text", [
    (0.52, "Training images can be told from unseen ones by their error, AUC 0.60 (0.52 to 0.70; 0.5 is chance): 5 %"),
    (0.48, "It is not shown that training images can be told from unseen ones by their error: AUC 0.60 (0.48 "),
])
def test_membership_is_claimed_beyond_its_error_alone(low, text):
    figures = dict(membership_auc=figure(0.6, low, 0.7), membership_found=figure(0.05, 0, 0.1))
    model = Measurement("a.pt", figures=figures)
    assert text in " ".join(verdict(model))


def test_the_epoch_to_keep_is_the_best_of_those_that_do_not_copy():
    chance, much = (0.01, 0.005, 0.02), (0.1, 0.08, 0.12)
    runs = [measurement(10, chance, 0.2), measurement(20, chance, 0.102), measurement(30, chance, 0.1),
            measurement(40, much, 0.05)]
    text = epoch_to_keep(runs)
    assert text.startswith("Keep epoch 30") and "Epoch 20 is as near" in text and "1 of 4 checkpoints copy" in text
    assert "Every checkpoint copies" in epoch_to_keep(runs[-1:] * 2)
    assert epoch_to_keep(runs[:1]) == ""


def test_the_epoch_to_keep_is_by_outside_features_where_all_have_them():
    runs = [measurement(10, (0.01, 0.005, 0.02), 0.1), measurement(20, (0.01, 0.005, 0.02), 0.2)]
    runs[1].figures["efficientnet_kid"] = figure(0.05, 0.04, 0.06)
    assert epoch_to_keep(runs).startswith("Keep epoch 10") and "(patch distance)" in epoch_to_keep(runs)
    runs[0].figures["efficientnet_kid"] = figure(0.2, 0.18, 0.22)
    text = epoch_to_keep(runs)
    assert text.startswith("Keep epoch 20") and "(KID × 1000, EfficientNet)" in text and "as near" not in text


def test_the_table_names_the_data_set_and_has_a_row_for_each_figure():
    lines = table(measurement(1, (0.012, 0.007, 0.02), 0.1)).splitlines()
    assert lines[0] == "model trained on: critters"
    assert lines[1].split() == ["samples", "real", "images", "better"]
    assert lines[2].split("  ")[0] == "copies" and "1.2 % (0.7 to 2.0)" in lines[2] and len(lines) == 7
    assert "trained on" not in table(Measurement("samples"))


def test_figures_are_formatted_with_their_unit():
    assert format_figure(figure(0.0412, 0.03, 0.055), "%") == ("4.1 %", "3.0 to 5.5")
    assert format_figure(dict(value=12.345), "1") == ("12.3", "")
    assert format_figure(None, "2") == ("", "")


def test_a_report_becomes_markdown_for_the_checkpoint_that_it_measured(own_folder):
    honest = measurement(1, (0.012, 0.007, 0.02), 0.1)
    report = dict(summary="1,000 samples.", runs=[_as_dict(measurement(0, (0, 0, 0), 1.0)) | dict(name="b.pt"),
                                                  _as_dict(honest)])
    Path("runs/evaluation").mkdir(parents=True)
    path = Path("runs/evaluation/report.json")
    path.write_text(json.dumps(report))
    assert find_report(Path("runs/a.pt")) == path  # beside the checkpoint
    text = report_markdown(path, Path("runs/a.pt"))
    assert "| copies | 1.2 % (0.7 to 2.0) |  | lower |" in text and "1.000" not in text
    assert "| precision | 60.0 % (55.0 to 65.0) | 80.0 % (75.0 to 85.0) | higher |" in text
    assert text.startswith("1,000 samples.\n\n|") and f"- {verdict(honest)[0]}" in text

    assert find_report(Path("runs/c.pt")) is None
    with pytest.raises(Exception, match="no figures that are certainly of runs/c.pt"):
        report_markdown(path, Path("runs/c.pt"))
    Path("outputs/evaluation").mkdir(parents=True)
    path.rename("outputs/evaluation/report.json")
    assert find_report(Path("runs/a.pt")) is None  # of a.pt here, not of that in runs/
    assert find_report(Path("a.pt")) == Path("outputs/evaluation/report.json")


def test_a_report_of_two_checkpoints_of_one_name_gives_each_its_own_figures(own_folder):
    names = ["checkpoints/a/final_model.pt", "checkpoints/b/final_model.pt"]
    runs = [_as_dict(measurement(1, (copies, copies, copies), 0.1)) | dict(name=name)
            for name, copies in zip(names, (0.01, 0.02))]
    path = Path("outputs/evaluation/report.json")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dict(summary="9 samples.", runs=runs)))
    for name, copies in zip(names, ("1.0 %", "2.0 %")):
        assert find_report(Path(name)) == path
        assert f"| copies | {copies}" in report_markdown(path, Path(name))
        assert f"| copies | {copies}" in report_markdown(path, Path(name).resolve())
    path.write_text(json.dumps(dict(summary="9 samples.", runs=runs[:1])))
    with pytest.raises(UserError, match="no figures that are certainly of"):
        report_markdown(path, Path(names[1]))
    path.write_text(json.dumps(dict(summary="9 samples.", runs=runs)))
    Path("checkpoints/c").mkdir(parents=True)
    path.rename("checkpoints/c/report.json")  # of no checkpoint there
    assert find_report(Path("checkpoints/c/final_model.pt")) is None
    with pytest.raises(UserError, match="no figures that are certainly of"):
        report_markdown(Path("checkpoints/c/report.json"), Path("checkpoints/c/final_model.pt"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": [{"name": "a.pt"}], "summary": 1}', "[" * 100_000,
                                  '{"runs": [{"name": "a.pt", "figures": {"copies": {"value": "x"}}}]}'])
def test_a_report_of_something_else_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match="report") as refused:
        report_markdown(tmp_path / "report.json", tmp_path / "a.pt")
    assert "\n" not in str(refused.value)
