"""The data of an evaluation: the training's own images, unseen ones, and samples as the model drew them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import evaluate
from critters import draw_critters
from evaluation.data import CheckpointInfo, DataSource, common_source, load_data, load_samples, native_side, read_info
from training.dataset import ImageFolder
from utils.checkpoint import save_checkpoint
from utils.images import enlarge, save_image, to_pil

pytestmark = pytest.mark.usefixtures("own_folder")


def critters(count: int, seed: int, side: int = 16) -> torch.Tensor:
    return torch.from_numpy(draw_critters(count, side, seed)[0]).permute(0, 3, 1, 2)


def info(path: str = "a.pt", **settings) -> CheckpointInfo:
    settings = dict(data="critters", image_size=16, labels="auto", num_critters=60, seed=0) | settings
    return CheckpointInfo(path, 1, settings, (), ())


def test_the_training_seed_does_not_change_the_critters():
    """They have a seed of their own, `data_seed`; trainings that do not know it drew them from their only seed."""
    for settings, seed in ((dict(seed=5, data_seed=0), 0), (dict(seed=0, data_seed=7), 7), (dict(seed=5), 5)):
        data = load_data(common_source([info(**settings)]))
        assert data.train.equal(critters(60, seed))
    same_data = [info(seed=1, data_seed=0), info(seed=2, data_seed=0)]
    assert common_source(same_data) == DataSource("critters", 16, "auto", 60, splits="none")
    with pytest.raises(ValueError, match="different data"):
        common_source([info(seed=1), info(seed=2)])


def saved(path: str, types: tuple[str, ...] = ("fire", "ice"), **settings) -> CheckpointInfo:
    """What is read of a checkpoint; without `splits` among the settings it is an older one."""
    save_checkpoint(path, network={}, epoch=1, types=list(types), held_out=[],
                    config=dict(image_size=16, labels="auto", num_critters=60, data_seed=0) | settings)
    return read_info(Path(path))


def test_an_older_and_a_new_checkpoint_of_the_same_data_are_compared():
    new = dict(splits="auto", label_column=())
    for data in ("critters", "folder"):
        infos = [saved("old.pt", data=data), saved("new.pt", data=data, **new)]
        common_source(infos)
        common_source(infos[::-1])
        for other in (saved("other.pt", ("fire",), data=data, **new), saved("other.pt", data="elsewhere", **new),
                      saved("other.pt", data=data, **new | dict(label_column=("kind",)))):
            with pytest.raises(ValueError, match="different data"):
                common_source([infos[0], other])
    assert "splits" not in saved("old.pt", data="critters").settings


def test_labels_that_are_given_need_a_checkpoint_with_types():
    for settings in (dict(labels="missing.csv"), dict(label_column=("kind",))):
        with pytest.raises(ValueError, match="knows no types: leave out --labels"):
            evaluate.find_data(evaluate.Settings(**settings), [info()])
    assert len(evaluate.find_data(evaluate.Settings(labels="none"), [info()]).train) == 60


def test_a_column_alone_is_looked_for_in_the_metadata_by_an_older_checkpoint_too():
    for i, pixels in enumerate(critters(2, 0)):
        save_image(to_pil(pixels), f"folder/{i}.png")
    Path("folder/metadata.csv").write_text("file_name,label,kind\n0.png,a,ice\n1.png,b,fire\n")
    data = evaluate.find_data(evaluate.Settings(label_column=("kind",)), [saved("old.pt", data="folder")])
    assert data.train_labels.tolist() == [[0, 1], [1, 0]]


def test_unseen_critters_are_those_of_the_evaluation():
    data = load_data(DataSource("critters", 16, num_critters=60), class_names=("fairy", "fire"))
    images, types = draw_critters(60, 16, 3_000_003)
    assert data.unseen.equal(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert data.unseen_labels.tolist() == [["fairy" in names, "fire" in names] for names in types]
    assert data.train_labels.shape == (60, 2)


def test_enlarged_samples_are_reduced_to_their_native_pixels():
    drawn = critters(6, 0)
    for i, pixels in enumerate(drawn):
        scale = (1, 2, 5)[i % 3]
        save_image(to_pil(enlarge(pixels, scale)), f"samples/{i}.png", seed=i, image_size=16, scale=scale)
    assert load_samples("samples", 16).equal(drawn)
    assert native_side("samples") == 16
    # At another size they are resized as the images would be that were not enlarged.
    for i, pixels in enumerate(drawn):
        save_image(to_pil(pixels), f"native/{i}.png")
    assert load_samples("samples", 24).equal(ImageFolder("native", 24).images)


@pytest.mark.parametrize("text", [
    None, "{}", "[1, 2]", "not JSON", json.dumps(dict(image_size=16)), json.dumps(dict(image_size=8, scale=2)),
    json.dumps(dict(image_size="16", scale=2)), json.dumps(dict(image_size=16, scale=0)),
])
def test_images_without_valid_metadata_are_resized_as_before(text):
    """The last ones do not describe the file: it may have been cropped, or be a grid of samples."""
    metadata = PngInfo()
    if text is not None:
        metadata.add_itxt("PokeDiff", text)
    to_pil(enlarge(critters(1, 0)[0], 2)).save("0.png", pnginfo=metadata)
    assert load_samples(".", 16).equal(ImageFolder(".", 16).images)
    assert native_side(".") == 32


def test_held_out_images_are_not_training_images():
    for i, pixels in enumerate(critters(10, 0)):
        save_image(to_pil(pixels), f"data/{i}.png")
    data = load_data(DataSource("data", 16), held_out=["3.png", "7.png"])
    assert data.unseen.equal(critters(10, 0)[[3, 7]]) and len(data.train) == 8
    assert not {"3.png", "7.png"} & set(data.names) and not data.notes
    with pytest.raises(ValueError, match="none of the 1 images"):
        load_data(DataSource("data", 16), held_out=["elsewhere.png"])


def test_an_animation_or_a_jpeg_among_the_samples_is_read():
    Image.new("RGB", (16, 16), "red").save("0.jpg")
    Image.new("RGB", (16, 16), "red").save("1.gif", save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")])
    assert load_samples(".", 16).shape == (2, 3, 16, 16)
