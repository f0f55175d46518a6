"""The embedded demonstration model: `model/` and its sample records, `samples/`. `make.py` made both."""

from pathlib import Path

NAME = "starter"
FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
SAMPLES = FOLDER / "samples"
NOTICE = "the starter is a demonstration model of a few million parameters: it knows next to nothing"
