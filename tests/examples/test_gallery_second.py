"""Examples 06 to 10: each runs in fast mode, saves its figure, and its numbers obey the law that it is about."""

import math
from pathlib import Path

import pytest

from tests.examples import load


def numbers(name: str, folder: Path) -> dict[str, float]:
    """Run an example's fast mode; return its numbers after a look at the figure."""
    figure = folder / f"{name}.png"
    found = load(name).main(fast=True, figure=figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size < 150_000
    assert all(math.isfinite(value) for value in found.values())
    return found


def test_dropblock_images(tmp_path: Path) -> None:
    found = numbers("06_dropblock_images", tmp_path)
    # alone only if all neighbours are dropped too, of which the border has fewer: 36 places have 4, 24 have 3, 4 have 2
    p = 0.3
    expected = 1 - (36 * p**4 + 24 * p**3 + 4 * p**2) / 64
    assert found["neighbour, elementwise"] == pytest.approx(expected, abs=0.003)
    assert found["neighbour, block"] < 0.7
    assert found["gain, block"] > found["gain, elementwise"] > 0


def test_mc_dropout_diagnosis(tmp_path: Path) -> None:
    found = numbers("09_mc_dropout_diagnosis", tmp_path)
    assert found["log loss, sampled"] < 0.85 * found["log loss, plain"]
    assert found["caught, plain"] > 0.4  # at random: 0.1
    assert found["caught, total"] > 0.4
    assert found["far, total"] == pytest.approx(found["far, aleatoric"] + found["far, epistemic"], abs=1e-5)
    assert found["far, plain"] < 0.01 < 0.1 < found["far, epistemic"]
    assert found["far, total"] < math.log(2)


def test_graphs_homophily(tmp_path: Path) -> None:
    found = numbers("08_graphs_homophily", tmp_path)
    # each kind of dropout makes the network rely on what it does not drop
    reliance = {kind: found[f"reliance at 0.5, {kind}"] for kind in ("none", "feature", "node", "edge")}
    assert reliance["edge"] < reliance["none"] < reliance["feature"] < reliance["node"]
    assert found["gain at 0.5, node"] < 0
    assert found["doubt, open"] > 3 * found["doubt, others"]


def test_where_in_sequences(tmp_path: Path) -> None:
    found = numbers("07_where_in_sequences", tmp_path)
    for network, n_places in (("LSTM", 6), ("Transformer", 4)):
        train = {key: value for key, value in found.items() if key.startswith(network) and key.endswith("train")}
        assert len(train) == n_places
        plain = train.pop(f"{network}, none, train")
        # whatever is dropped, the training text is fitted less well
        assert plain < min(train.values())


def test_exact_dropout(tmp_path: Path) -> None:
    found = numbers("10_exact_dropout", tmp_path)
    usual, exact, ensemble = "Monte-Carlo dropout", "exact dropout", "deep ensemble"
    growth = {m: found[f"{m}, in the gap, sigma"] / found[f"{m}, at data, sigma"] for m in (usual, exact, ensemble)}
    assert growth[usual] < 1.5 < 3 < min(growth[exact], growth[ensemble])
    assert found[f"{usual}, in the gap, coverage"] < 0.5 < found[f"{exact} with draws, in the gap, coverage"]
    # the functions fit the data, each of them: to within their noise of 0.1
    assert found[f"{exact}, at data, sigma"] < 0.05 < found[f"{usual}, at data, sigma"]
    # independent noise widens a mask's spread, and moves the mean nowhere
    for region in ("at data", "in the gap", "outside"):
        assert found[f"{exact} with draws, {region}, sigma"] > found[f"{exact}, {region}, sigma"]
        assert found[f"{exact} with draws, {region}, error"] == pytest.approx(
            found[f"{exact}, {region}, error"], rel=1e-3
        )
