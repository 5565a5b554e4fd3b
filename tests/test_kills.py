"""A training that is killed eight times ends as one that was not: a short form of kill_many.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill_many.py forks")
def test_eight_kills_change_nothing():
    script = Path(__file__).with_name("kill_many.py")
    done = subprocess.run([sys.executable, script, "--kills", "8"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) >= 8 and "bit for bit" in done.stdout
