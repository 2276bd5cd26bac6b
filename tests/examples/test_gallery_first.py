"""Examples 01 to 05 in their fast mode: the figure is there, and the numbers obey the law that the example is about."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.examples import load


def run(name: str, folder: Path) -> dict[str, float]:
    figure = folder / f"{name}.png"
    numbers = load(name).main(fast=True, figure=figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size < 150_000
    return numbers


def test_inverted_and_classic(tmp_path: Path) -> None:
    numbers = run("01_inverted_and_classic", tmp_path)
    assert numbers["largest_difference"] < 1e-5
    for scheme, mean in (("inverted", 1.0), ("classic", 0.5)):
        assert abs(numbers[f"{scheme}_train"] - mean) < 5 * numbers[f"{scheme}_error"]
        assert numbers[f"{scheme}_eval"] == mean
        assert numbers[f"{scheme}_variance"] == pytest.approx(numbers[f"{scheme}_law"], rel=0.02)
        assert numbers[f"{scheme}_wrong_loss"] > 1.3 * numbers[f"{scheme}_right_loss"]


def test_ensemble_and_jensen_gap(tmp_path: Path) -> None:
    numbers = run("02_ensemble_and_jensen_gap", tmp_path)
    assert numbers["scaled"] == pytest.approx(numbers["geometric"], abs=1e-12)
    assert abs(numbers["scaled"] - numbers["arithmetic"]) > numbers["sampled_error"]
    # five averages; the ratio of their root mean square to the standard error is below 2 with probability 0.9997
    assert numbers["sampled_error"] < 2 * numbers["stated_error"]
    assert numbers["one_site_ratio"] < 2 * numbers["noise_ratio"] < numbers["deep_ratio"]


def test_dropout_is_ridge(tmp_path: Path) -> None:
    numbers = run("03_dropout_is_ridge", tmp_path)
    assert abs(numbers["loss"] - numbers["loss_law"]) < 5 * numbers["loss_error"]
    assert numbers["loss"] - numbers["plain_loss"] > 5 * numbers["loss_error"]
    # of 40 numbers that are t-distributed with 15 degrees of freedom
    assert numbers["largest_z"] < 6
    assert numbers["to_ridge"] < 0.05 * numbers["to_least_squares"]
    assert numbers["dropout_units"] < 1e-12 < 0.1 < numbers["ridge_units"]


def test_gradient_noise_and_sharpness(tmp_path: Path) -> None:
    numbers = run("04_gradient_noise_and_sharpness", tmp_path)
    # 200 000 gradients that are 0 or of mean 2: the relative standard error of their variance is below 0.003
    assert numbers["independent"] == pytest.approx(1, abs=0.015)
    assert 0.7 < numbers["narrow"] < 1.05
    assert 0.7 < numbers["wide"] < 1.05
    assert all(
        0 < numbers[f"{unit}_{loss}_rise"] < 0.5 for unit in ("ReLU", "tanh") for loss in ("plain", "regularised")
    )


def test_relu_and_initialisation(tmp_path: Path) -> None:
    numbers = run("05_relu_and_initialisation", tmp_path)
    names = [name for name in numbers if f"{name}, error" in numbers]
    assert len(names) == 11
    for name in names:  # growth over 50 layers relative to the law; the error is a factor too
        assert abs(math.log(numbers[name])) < 5 * math.log(numbers[f"{name}, error"])
    assert numbers["one_layer_z"] < 5
    assert numbers["deep_mean"] < 0.7
