"""The modules of the repository can be imported by every test, and plots need no screen."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["MPLBACKEND"] = "Agg"


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Run the test in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def plain_loss_curve(monkeypatch):
    """Spare the test the loss curve, whose drawing takes as long as the rest of a tiny training."""
    from training.run_dir import RunDir  # not above: it needs the path that is set there

    monkeypatch.setattr(RunDir, "draw_loss", lambda run, path: path.write_text(str(run.history)))


@pytest.fixture(autouse=True)
def same_threads():
    """Undo a command's choice of threads: sums in another order would change the bits of later trainings."""
    import torch

    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """Return a folder in which a tiny training of 3 epochs, 6 steps, was run. Not to be written to."""
    from scripts import TINY, call_in

    import train

    return call_in(tmp_path_factory.mktemp("trained"), train, *TINY, "--milestone_every", 2, "--sample_every", 1)


@pytest.fixture
def final(trained) -> Path:
    return trained / "checkpoints/final_model.pt"


@pytest.fixture(scope="session")
def trained_autoencoder(tmp_path_factory) -> Path:
    """Return a folder in which a tiny autoencoder was trained for 8 steps. Not to be written to."""
    from scripts import TINY_AUTOENCODER, call_in

    from tools import train_autoencoder

    return call_in(tmp_path_factory.mktemp("trained_autoencoder"), train_autoencoder, *TINY_AUTOENCODER)


@pytest.fixture(scope="session")
def browser():
    """Return playwright's Browser, one for all tests: the system's own Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
