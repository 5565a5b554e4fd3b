"""The scripts of the repository's top level can be imported by every test, and figures need no screen."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["MPLBACKEND"] = "Agg"
