"""Top folders named train, validation and test: which of them are splits, and what a run makes of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from scripts import TINY, assert_one_line, assert_same_run, call

import evaluate
import train
from evaluation.data import CheckpointInfo, DataSource, common_source, load_data, read_info
from tools import preview_data, train_autoencoder
from training.dataset import ImageFolder, held_out_names
from training.distributed import DistEnv
from training.splits import SPLIT_NAMES, describe_splits, find_splits, names_held_out
from utils.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("plain_loss_curve")
FOLDER = [*TINY, "--data", "images", "--epochs", "2", "--num_samples", "1"]


@pytest.fixture
def images(own_folder) -> Path:
    """A folder of two types in three splits, beside which one image lies."""
    for i, name in enumerate(("train/fire/1.png", "train/ice/2.png", "train/ice/3.png", "dev/fire/4.png",
                              "Test/ice/5.png", "Test/deep/ice/6.png", "7.png", "train/fire/8.png")):
        Path("images", name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (30 * i, 255 - 30 * i, 90)).save(Path("images", name))
    return Path("images")


HELD_OUT = ["Test/deep/ice/6.png", "Test/ice/5.png", "dev/fire/4.png"]


@pytest.mark.parametrize("names, found", [
    (["train/1.png", "test/2.png"], {"train": "train", "test": "test"}),
    (["Training/a/1.png", "VALID/2.png", "3.png"], {"Training": "train", "VALID": "validation"}),
    (["train/1.png"], {"train": "train"}),
    (["train/1.png", "car/2.png", "ship/3.png"], {}),  # a train is something to draw
    (["train/1.png", "test/2.png", "ship/3.png"], {}),
    (["test/1.png", "val/2.png"], {}),  # nothing to train on
    (["a/train/1.png", "a/test/2.png"], {}),
    (["trains/1.png", "test/2.png"], {}),
    (["train", "test.png"], {}),
])
def test_which_folders_are_splits(names, found):
    assert find_splits(names) == found and find_splits(names, "none") == {}
    held_out = [name for name in names if found.get(name.split("/")[0]) in ("validation", "test")]
    assert names_held_out(names) == held_out and names_held_out(names, "none") == []
    assert bool(describe_splits(names)) == bool(found)


def test_every_name_of_a_split():
    for name in SPLIT_NAMES:
        assert set(find_splits([f"{name}/1.png", "train/2.png"])) == {name, "train"}
    assert describe_splits(["train/1.png", "train/2.png", "val/3.png", "eval/4.png", "5.png"]) == (
        "splits: train/ (2) and 1 beside it trained on, eval/ (1) and val/ (1) held out")


def test_a_fraction_of_the_training_images_can_be_held_out_as_well():
    names = [f"train/{i}.png" for i in range(40)] + ["val/1.png", "val/2.png"]
    held_out = held_out_names(names, 0.25, "auto")
    assert len(held_out) == 12 and held_out == sorted(held_out) and {"val/1.png", "val/2.png"} <= set(held_out)
    assert set(held_out_names(names[:40], 0.25)) == set(held_out) - {"val/1.png", "val/2.png"}
    assert held_out_names(names, 0, "none") == []


def test_types_are_those_within_the_splits(images):
    dataset = ImageFolder(images, 16)
    assert dataset.class_names == ("deep", "fire", "ice")
    assert dataset.labels[dataset.names.index("train/ice/2.png")].tolist() == [0, 0, 1]
    assert dataset.origin == ("labels: the names of sub-folders; splits: train/ (4) and 1 beside it trained on, Test/ "
                              "(2) and dev/ (1) held out")
    assert ImageFolder(images, 16, splits="none").class_names == ("dev", "test", "train")


def test_a_run_holds_out_validation_and_test_and_resumes_with_them(images, capsys):
    assert call(train, *FOLDER, "--run_name", "whole") == 0
    whole = load_checkpoint("checkpoints/whole/latest.pt")
    assert whole["held_out"] == HELD_OUT and whole["num_images"] == 5 and whole["types"] == ["deep", "fire", "ice"]
    assert "Test/ (2) and dev/ (1) held out" in capsys.readouterr().out
    assert call(train, *FOLDER, "--max_steps", 3) == 0
    assert call(train, "--resume", "--max_steps", 0) == 0
    assert_same_run(load_checkpoint("checkpoints/latest.pt"), whole)

    # The archive of the folder is the folder.
    shutil.make_archive("packed", "zip", ".", "images")
    assert call(train, *FOLDER, "--data", "packed.zip", "--run_name", "packed") == 0
    packed = load_checkpoint("checkpoints/packed/latest.pt")
    assert packed["config"].pop("data") == "packed.zip" and whole["config"].pop("data") == "images"
    assert_same_run(packed, whole)

    # The images that evaluate.py measures with.
    for name in ("whole", "packed"):
        info = read_info(Path(f"checkpoints/{name}/final_model.pt"))
        data = load_data(common_source([info]), info.held_out, info.class_names)
        dataset = ImageFolder(images, 16)
        assert data.unseen.equal(dataset.images[[dataset.names.index(held_out) for held_out in HELD_OUT]])
        assert len(data.train) == 5 and data.train_labels.shape == (5, 3) and data.unseen_labels.sum() == 3


def test_samples_without_a_checkpoint_are_compared_with_the_splits(images):
    data = load_data(DataSource("images", 16), held_out=None)
    assert len(data.train) == 5 and len(data.unseen) == 3
    assert len(load_data(DataSource("images", 16, splits="none"), held_out=None).unseen) == 0


def test_the_splits_of_another_folder_than_the_training_s(images):
    """Of the training's own folder, a checkpoint that held nothing out has seen all."""
    info = CheckpointInfo(Path("a.pt"), 1, dict(data="own", image_size=16), (), ())
    other = evaluate.find_data(evaluate.Settings(data="images"), [info])
    assert len(other.train) == 5 and len(other.unseen) == 3
    images.rename("own")
    for data in (None, "own", "./own/", str(Path("own").resolve())):
        own = evaluate.find_data(evaluate.Settings(data=data), [info])
        assert len(own.train) == 8 and len(own.unseen) == 0


def test_other_commands_see_the_same(images, capsys):
    assert call(train_autoencoder, "--data", "images", "--image_size", 16, "--width", 8, "--epochs", 1, "--batch_size",
                4, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "measured   on 3 held-out images" in printed and "data       splits: train/ (4)" in printed
    assert load_checkpoint("checkpoints/autoencoder/latest.pt")["held_out"] == HELD_OUT
    assert call(preview_data, "images", "--image_size", 16) == 0
    assert "labels: the names of sub-folders; splits: train/ (4)" in capsys.readouterr().out
    assert call(preview_data, "images", "--image_size", 16, "--splits", "none", "--labels", "none") == 0
    assert "8 images in images, 0 files left out\noutputs" in capsys.readouterr().out


def to_before_splits(path: str) -> None:
    """Turn a checkpoint into one of the version that knew neither splits nor metadata."""
    content = load_checkpoint(path)
    for name in ("splits", "label_column", "log"):
        content["config"].pop(name, None)
    content["config"]["labels"] = "auto"
    del content["format"]
    save_checkpoint(path, **content)


def test_a_run_from_before_splits_finds_what_it_found(images, capsys):
    before = [*FOLDER, "--splits", "none", "--labels", "csv_or_folders"]
    assert call(train, *before, "--run_name", "whole") == 0
    whole = load_checkpoint("checkpoints/whole/latest.pt")
    assert whole["types"] == ["dev", "test", "train"] and whole["held_out"] == []
    assert call(train, *before, "--max_steps", 3) == 0
    for name in ("latest.pt", "final_model.pt"):
        to_before_splits(f"checkpoints/{name}")
    Path("images/metadata.csv").write_text("file_name,label\n7.png,water\n")  # it was there, and was not read
    info = read_info(Path("checkpoints/final_model.pt"))
    assert load_data(common_source([info]), info.held_out, info.class_names).train_labels.sum() == 7
    assert call(train, "--resume", "--max_steps", 0) == 0
    assert_same_run(load_checkpoint("checkpoints/latest.pt"), whole)
    # A new run reads it all.
    assert call(train, *FOLDER, "--run_name", "new") == 0
    assert load_checkpoint("checkpoints/new/latest.pt")["types"] == ["water"]


def test_resume_refuses_other_labels(images, capsys):
    Path("images/metadata.csv").write_text("file_name,label\n7.png,water\ntrain/ice/2.png,ice\n")
    assert call(train, *FOLDER, "--max_steps", 1) == 0
    assert "labels: column label of images/metadata.csv; splits: " in capsys.readouterr().out
    Path("images/metadata.csv").write_text("file_name,label\n7.png,ice\ntrain/ice/2.png,water\n")
    code = call(train, "--resume", "--max_steps", 0)
    assert code.startswith("error: images has other file names or other labels") and "\n" not in code
    capsys.readouterr()
    assert_one_line(call(train, "--resume", "--splits", "none"), capsys, "--splits auto")


def test_both_stages_of_a_run_read_the_data_alike(own_folder, monkeypatch):
    stages = []
    monkeypatch.setattr(train, "train_autoencoder", lambda config, *_: stages.append(config))
    monkeypatch.setattr(train, "estimate_diffusion", lambda *_: 0.0)
    config = train.Config(data="images", splits="none", holdout=0.5, num_critters=7, data_seed=3)
    train.train_own_autoencoder(config, False, DistEnv())
    for name in ("data", "splits", "holdout", "num_critters", "data_seed"):
        assert getattr(stages[0], name) == getattr(config, name)
