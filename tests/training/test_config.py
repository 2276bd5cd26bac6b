import pytest

from forcedrop.training import ConfigError, load_config, parse_config

NONE = {"edge": 0, "message": 0, "update": 0, "readout": 0}
MINIMAL = {"output": "runs/x", "data": {"train": ["a.xyz"]}}


def test_what_gives_error_bars() -> None:
    masks = {"dropout": {"readout": 0.3}}
    assert parse_config({**MINIMAL, **masks}).trains_masks
    assert parse_config({**MINIMAL, **masks, "stage_one": {"dropout": False}, "stage_two": {"epochs": 1}}).trains_masks
    plain = parse_config(MINIMAL)
    assert not plain.trains_masks
    assert plain.gives_error_bars
    assert not parse_config({**MINIMAL, "posterior": {"frames": 0}}).gives_error_bars


def test_defaults() -> None:
    config = parse_config(MINIMAL)
    assert (
        config.dropout.bank > config.model.n_channels + config.model.n_hidden
    )  # else weights exist that no mask changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage_on": {"epochs": 3}}, "unknown key `stage_on`; did you mean `stage_one`?"),
        ({"stage_one": {"epoch": 3}}, "unknown key `stage_one.epoch`; did you mean `stage_one.epochs`?"),
        ({"data": {"train": ["a"], "vaildation": ["b"]}}, "did you mean `data.validation`?"),
        ({"model": {"cutoff": -1}}, r"`model.cutoff`: Input should be greater than 0, got -1"),
        ({"stage_one": {"epochs": "many"}}, "`stage_one.epochs`: .*valid integer.*got 'many'"),
        ({"dropout": {"update": 1.0}}, "`dropout.update`: .*less than 1"),
        ({"data": {}}, "missing key `data.train`"),
        ({"precision": "half"}, "`precision`: .*float32"),
        ({"stage_two": {"samples": 300}}, "`stage_two.samples` must not exceed `dropout.bank`, got 300 of 256"),
        ({"dropout": NONE, "stage_two": {"epochs": 1}}, "nothing to sample"),
        ({"dropout": {"update": 0.1}, "stage_one": {"dropout": False}}, "no stage trains with masks"),
    ],
)
def test_each_mistake_is_named(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**MINIMAL, **change})


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, "sed": 1, "model": {"cutof": 5}})
    assert "`seed`" in str(caught.value)
    assert "`model.cutoff`" in str(caught.value)


def test_files(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no such training file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="must hold keys and values, got list"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "good.yaml").write_text("output: out\ndata: {train: [a.xyz], isolated_atoms: {H: -1.0}}")
    config = load_config(tmp_path / "good.yaml")
    assert config.output == tmp_path / "out"
    assert config.data.train == [tmp_path / "a.xyz"]
    assert config.data.isolated_atoms == {"H": -1.0}
