"""Predicts y for every x on the command line with the model in model.json."""

import json
import pathlib
import sys

import numpy as np


def predict(xs: list[float]) -> np.ndarray:
    model = json.loads((pathlib.Path(__file__).parent / "model.json").read_text("utf-8"))
    return np.polyval([model["slope"], model["intercept"]], np.array(xs))


if __name__ == "__main__":
    for x, y in zip(sys.argv[1:], predict([float(a) for a in sys.argv[1:]])):
        print(f"{x} {y:.1f}")
