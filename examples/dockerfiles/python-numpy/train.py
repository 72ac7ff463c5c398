"""Fits a line to noisy samples by least squares and writes the model as JSON."""

import json
import sys

import numpy as np

SLOPE, INTERCEPT = 2.5, -1.0


def samples(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed=7)
    x = np.linspace(0, 10, n)
    return x, SLOPE * x + INTERCEPT + rng.normal(scale=0.1, size=n)


def fit(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    a = np.column_stack([x, np.ones_like(x)])
    (slope, intercept), *_ = np.linalg.lstsq(a, y, rcond=None)
    return {"slope": float(slope), "intercept": float(intercept)}


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as f:
        json.dump(fit(*samples(10_000)), f)
