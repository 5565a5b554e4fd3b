"""tools/plot_forward.py: it plots, and its errors are one line."""

import numpy as np
import pytest
from PIL import Image
from scripts import assert_one_line, call

from tools import plot_forward

pytestmark = pytest.mark.usefixtures("own_folder")
PLOTS = ("forward_diffusion.png", "schedules.png")


def test_plots_are_drawn(tmp_path):
    Image.new("RGB", (40, 30), "red").save("cat.png")
    for flags in ([], ["cat.png"]):
        assert call(plot_forward, "--image_size", 16, *flags) == 0
        assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == sorted(PLOTS)
        for name in PLOTS:
            plot = np.asarray(Image.open(tmp_path / "outputs" / name).convert("RGB"))
            assert plot.std() > 5  # not blank
            (tmp_path / "outputs" / name).unlink()


def test_image_files_become_x_0():
    Image.new("RGB", (40, 30), (255, 0, 0)).save("cat.png")
    x_0 = plot_forward.load_x_0("cat.png", 8)
    assert x_0.shape == (1, 3, 8, 8) and x_0[0, 0].eq(1).all() and x_0[0, 1:].eq(-1).all()


def test_a_missing_image_is_one_line(capsys):
    assert_one_line(call(plot_forward, "no_cat.jpg"), capsys, "cannot read no_cat.jpg: not a file")


def test_a_damaged_image_is_one_line_that_names_it(tmp_path, capsys):
    Image.new("RGB", (40, 30), "red").save("cat.png")
    whole = (tmp_path / "cat.png").read_bytes()
    for content, reason in ((b"", "not an image, or an empty file"), (b"a letter", "not an image"), (whole[:60], "")):
        (tmp_path / "bad.png").write_bytes(content)
        assert_one_line(call(plot_forward, "bad.png"), capsys, "cannot read bad.png: ", reason)
    assert not (tmp_path / "outputs").exists()


def test_an_output_that_is_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "taken").touch()
    assert_one_line(call(plot_forward, "--image_size", 16, "--output", "taken"), capsys, "taken")


def test_an_error_of_the_program_is_not_hidden(monkeypatch):
    """Only what a user can cause becomes one line; a bug must keep its traceback."""
    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(plot_forward, "draw_schedules", broken)
    with pytest.raises(KeyError, match="a bug"):
        call(plot_forward, "--image_size", 16)


def test_a_failed_plot_leaves_the_old_one(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, path, **_):
        path.write_bytes(b"half a plot")
        raise OSError("disk full")

    (tmp_path / "schedules.png").write_bytes(b"an older plot")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_forward.draw_schedules(tmp_path / "schedules.png")
    assert [path.name for path in tmp_path.iterdir()] == ["schedules.png"]
    assert (tmp_path / "schedules.png").read_bytes() == b"an older plot"
