"""--log tensorboard: what TensorBoard reads back is metrics.csv and the grids, after any kill and resume."""

from __future__ import annotations

import io
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scripts import TINY, assert_one_line, call, metrics

import train
from training import event_log
from training.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("own_folder", "plain_loss_curve")
RUN = [*TINY, "--log", "tensorboard", "--sample_every", "2", "--epochs", "6", "--num_samples", "2"]
ALL_GRIDS = {4: "generated_epoch_0002.png", 5: "generated_epoch_0003.png", 8: "generated_epoch_0004.png",
             12: "generated_epoch_0006.png"}  # of the run in two parts below


@pytest.fixture
def tensorboard():
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")


def read_back(folder: str = "outputs"):
    """Return what TensorBoard's own reader makes of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = dict(scalars=0, images=0, tensors=0)
    return EventAccumulator(folder, size_guidance=everything).Reload()


def curves(folder: str = "outputs") -> dict[str, list[tuple[int, float]]]:
    read = read_back(folder)
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def assert_is_metrics_csv(folder: str = "outputs") -> None:
    rows = metrics(Path(folder, "metrics.csv").relative_to("outputs"))
    expected = {column: [(int(row["step"]), float(np.float32(row[column]))) for row in rows if row[column]]
                for column in rows[0] if column != "step"}
    assert curves(folder) == expected


def assert_shows_the_grids(steps_and_files: dict[int, str]) -> None:
    images = read_back().Images("samples")
    assert [image.step for image in images] == list(steps_and_files)
    for image, name in zip(images, steps_and_files.values()):
        assert np.array_equal(Image.open(io.BytesIO(image.encoded_image_string)), Image.open(Path("outputs", name)))


def event_files() -> list[Path]:
    """Return the event files in outputs/ that are not empty."""
    return sorted(path for path in Path("outputs").iterdir() if "tfevents" in path.name and path.stat().st_size)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The folder of a run of 12 steps, and a copy of it as it was after 5."""
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    folder = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "draw_loss", lambda run, path: path.touch())
        patch.chdir(folder)
        assert call(train, *RUN, "--max_steps", 5) == 0
        stopped = shutil.copytree(folder, tmp_path_factory.mktemp("stopped") / "run")
        assert call(train, "--resume", "--max_steps", 0) == 0
    return folder, stopped


def test_the_event_file_is_metrics_csv(logged, monkeypatch):
    monkeypatch.chdir(logged[0])
    assert len(metrics()) == 6 and len(event_files()) == 1
    assert_is_metrics_csv()
    assert_shows_the_grids(ALL_GRIDS)  # the one at the end of the first part as well, which is within an epoch


def test_the_settings_are_hparams(logged, monkeypatch):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    monkeypatch.chdir(logged[0])
    content = read_back().PluginTagToContent("hparams")
    settings = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    assert settings["lr"].number_value == 1e-4 and settings["multipliers"].string_value == "1 2"
    assert settings["augment"].string_value == "full"
    infos = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment.metric_infos
    assert [info.name.tag for info in infos] == ["loss"]


@pytest.mark.parametrize("seed", range(4))
def test_after_a_kill_nothing_is_there_twice(logged, seed):
    """The run was at step 12 when it was killed, and its latest.pt is of step 5; what it logged since is done again."""
    whole, stopped = logged
    chance = random.Random(seed)
    for name in ("outputs", "checkpoints"):
        shutil.copytree((whole if name == "outputs" else stopped) / name, name)
    (path,) = event_files()
    content = path.read_bytes()
    if seed > 0:  # in the middle of a record
        path.write_bytes(content[: chance.randrange(1, len(content))])
    if seed > 1:  # while a file was rewritten: what was there before it is there as well
        (old,) = (stopped / "outputs").glob("*tfevents*")
        shutil.copy(old, path.with_name(path.name.replace("tfevents.", "tfevents.0")))
    if seed > 2:
        path.with_name(f".{path.stem}.tmp{path.suffix}").write_bytes(content[:500])
    assert call(train, "--resume", "--max_steps", 0) == 0
    assert len(event_files()) == 1 and (seed > 0 or event_files() != [path])
    assert_is_metrics_csv()
    grids = dict(ALL_GRIDS)
    if seed == 1 and 5 not in {image.step for image in read_back().Images("samples")}:
        del grids[5]  # the kill took it, and the picture does not say which step of its epoch it is of
    assert_shows_the_grids(grids)
    assert {name: Path("outputs", name).read_bytes() for name in grids.values()} == {
        name: (whole / "outputs" / name).read_bytes() for name in grids.values()}


@pytest.mark.parametrize("moment", ["replace", "truncate"])
def test_a_kill_while_the_file_is_rewritten_doubles_nothing(logged, monkeypatch, moment):
    """Read back before anybody resumes."""
    whole, _ = logged
    shutil.copytree(whole / "outputs", "outputs")
    before = curves()

    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    settings, rows = train.Config(), [{**row, "epoch": int(row["epoch"]), "step": int(row["step"])}
                                      for row in metrics()]
    log = event_log.EventLog(Path("outputs"), vars(settings), rows[:3], list(rows[0]))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if moment == "replace":
            patch.setattr("utils.files.os.replace", die)
        else:
            patch.setattr(event_log.os, "truncate", die)
        log.rewrite()
    after = curves()
    kept = before if moment == "replace" else {tag: points[:3] for tag, points in before.items()}
    assert after == kept


def test_the_times_of_points_outlive_a_resume(logged):
    whole, stopped = logged
    for name in ("outputs", "checkpoints"):
        shutil.copytree(stopped / name, name)
    before = {event.step: event.wall_time for event in read_back().Scalars("loss")}
    assert call(train, "--resume", "--max_steps", 0) == 0
    after = {event.step: event.wall_time for event in read_back().Scalars("loss")}
    assert len(before) == 2 and before.items() <= after.items() and len(after) == 6


def test_a_tensorboard_that_is_open_shows_a_resumed_run(logged):
    whole, stopped = logged
    shutil.copytree(whole / "outputs", "outputs")
    shutil.copytree(stopped / "checkpoints", "checkpoints")
    viewer = read_back()
    assert len(viewer.Scalars("loss")) == 6
    for steps, length in ((7, 3), (0, 6)):
        assert call(train, "--resume", "--max_steps", steps) == 0
        assert [event.step for event in viewer.Reload().Scalars("loss")] == [2 * i + 2 for i in range(length)]
    assert len([path for path in Path("outputs").iterdir() if "tfevents" in path.name]) == 2  # one is empty


def test_logging_can_begin_with_a_resume(tensorboard):
    assert call(train, *RUN, "--log", "none", "--max_steps", 5) == 0
    assert event_files() == []
    Path("outputs/events.out.tfevents.1.of.another.program").touch()
    assert call(train, "--resume", "--max_steps", 0, "--log", "tensorboard") == 0
    Path("outputs/events.out.tfevents.1.of.another.program").unlink()
    assert_is_metrics_csv()
    assert_shows_the_grids({4: "generated_epoch_0002.png", 8: "generated_epoch_0004.png",
                            12: "generated_epoch_0006.png"})


def test_columns_that_only_some_rows_have(tensorboard):
    """An autoencoder is measured when its grid is drawn."""
    from scripts import TINY_AUTOENCODER

    from tools import train_autoencoder

    assert call(train_autoencoder, *TINY_AUTOENCODER, "--log", "tensorboard") == 0
    assert_is_metrics_csv("outputs/autoencoder")
    points = curves("outputs/autoencoder")
    assert len(points["loss"]) == 4 and [step for step, _ in points["psnr"]] == [4, 8]


def test_a_full_disk_stops_no_training_and_leaves_no_gap(tensorboard, monkeypatch, capsys):
    calls, append = [], event_log._append

    def fail_for_a_while(path, events):
        calls.append(path)
        if 4 < len(calls) < 9:
            path.open("ab").write(b"half a record")
            raise OSError(28, "No space left on device")
        append(path, events)

    monkeypatch.setattr(event_log, "_append", fail_for_a_while)
    assert call(train, *RUN) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "tfevents" in line]
    assert len(lines) == 2 and "No space left" in lines[0] and "training goes on" in lines[0]
    assert "could be written again" in lines[1]
    assert_is_metrics_csv()
    assert_shows_the_grids({4: "generated_epoch_0002.png", 8: "generated_epoch_0004.png",
                            12: "generated_epoch_0006.png"})


def test_settings_that_are_not_text(tensorboard):
    settings = dict(data="caf\udce9", multipliers=(1, 2), compile=False, milestones=())
    row = dict(epoch=1, step=2, loss=float("nan"))
    event_log.EventLog(Path(), settings, [row], list(row)).rewrite()
    assert np.isnan(read_back(".").Scalars("loss")[0].value)


def test_a_damaged_picture_or_name_spoils_no_event_file(tensorboard):
    Path("events.out.tfevents.x.pokediff").write_text("of somebody else")
    Path("generated_epoch_0001.png").write_bytes(b"damaged")
    Image.new("RGB", (4, 4)).save("generated_epoch_0002.png")
    rows = [dict(epoch=epoch, step=2 * epoch, loss=0.5) for epoch in (1, 2)]
    log = event_log.EventLog(Path(), {}, rows, list(rows[0]))
    log.rewrite()
    log.add_grid(2, Path("generated_epoch_0001.png"))
    log.add_grid(4, Path("generated_epoch_0002.png"))  # it is there
    assert [image.step for image in read_back(str(log.path)).Images("samples")] == [4]
    assert Path("events.out.tfevents.x.pokediff").read_text() == "of somebody else"


@pytest.mark.parametrize("error", [KeyError("step"), SyntaxError(), ZeroDivisionError("float division by zero")])
def test_no_error_of_an_event_file_stops_a_training(tensorboard, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    run = RunDir(train.Config(log="tensorboard"), [], ["epoch", "step", "loss"], new=True)
    with monkeypatch.context() as patch:
        patch.setattr(event_log, "_append", fail)
        for epoch in (1, 2):
            run.log(dict(epoch=epoch, step=2 * epoch, loss=0.5))
    run.log(dict(epoch=3, step=6, loss=0.5))
    warning, again = capsys.readouterr().err.splitlines()
    assert "training goes on" in warning and (str(error) or "SyntaxError") in warning and "written again" in again
    assert_is_metrics_csv()


def test_only_the_first_process_logs(tensorboard):
    run = RunDir(train.Config(log="tensorboard"), [], ["epoch", "step", "loss"], new=True, is_main=False)
    run.log(dict(epoch=1, step=2, loss=0.5))
    assert run.events is None and list(Path().iterdir()) == []


def test_without_the_package_it_is_one_line(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert_one_line(call(train, *RUN), capsys, "--log tensorboard needs", "requirements-tensorboard.txt")
    assert list(Path().iterdir()) == []
