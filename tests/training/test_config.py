import pytest

from forcedrop.training import ConfigError, load_config, parse_config
from forcedrop.uncertainty.exact_dropout import ExactDropout
from forcedrop.uncertainty.posterior import Posterior

MINIMAL = {"output": "runs/x", "data": {"train": ["a.xyz"]}}
MASKS = {"dropout": {"readout": 0.3}, "uncertainty": {"method": "masks"}}


def test_what_gives_error_bars_and_what_a_step_draws() -> None:
    plain = parse_config(MINIMAL)
    assert plain.gives_error_bars
    assert plain.uncertainty == ExactDropout()
    assert plain.training_functions == 0  # the plain network
    assert parse_config({**MINIMAL, "dropout": {"edge": 0.3}}).training_functions is None  # any number
    assert parse_config({**MINIMAL, **MASKS}).training_functions == 256
    assert parse_config({**MINIMAL, "uncertainty": {"method": "heads", "functions": 7}}).training_functions == 7
    assert not parse_config({**MINIMAL, "uncertainty": {"method": "none"}}).gives_error_bars


def test_defaults() -> None:
    config = parse_config({**MINIMAL, **MASKS})
    shape = config.model.shape
    assert (config.model.kind, config.model.cutoff) == ("sphere", 5.0)
    assert config.uncertainty.functions > shape.n_channels + shape.n_hidden  # else weights exist that no mask changes


def test_each_kind_of_network_and_method_has_settings_of_its_own() -> None:
    config = parse_config(
        {**MINIMAL, "model": {"kind": "painn", "n_layers": 2}, "uncertainty": {"method": "posterior", "frames": 9}}
    )
    assert (config.model.kind, config.model.shape.n_layers) == ("painn", 2)
    assert config.uncertainty == Posterior(frames=9)
    written = config.model_dump(mode="json")
    assert (written["model"]["kind"], written["uncertainty"]["method"]) == ("painn", "posterior")
    assert parse_config(written) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "unknown key `epoch`; did you mean `epochs`?"),
        ({"loss": {"force": 3}}, "unknown key `loss.force`; did you mean `loss.forces`?"),
        ({"data": {"train": ["a"], "vaildation": ["b"]}}, "did you mean `data.validation`?"),
        ({"model": {"cutoff": -1}}, r"`cutoff` must be positive \[Å\], got -1"),
        ({"model": {"n_chanels": 3}}, "unknown key `model.n_chanels`; did you mean `model.n_channels`?"),
        ({"model": {"kind": "circle"}}, "unknown kind of network 'circle'; known are sphere"),
        ({"model": 3}, "`model`: must hold keys and values, got int"),
        ({"epochs": "many"}, "`epochs`: .*valid integer.*got 'many'"),
        ({"epochs": 0}, "`epochs`: .*greater than or equal to 1, got 0"),
        ({"dropout": {"update": 1.0}}, "`dropout.update`: .*less than 1"),
        ({"data": {}}, "missing key `data.train`"),
        ({"precision": "half"}, "`precision`: .*float32"),
        (
            {"uncertainty": {"method": "magic"}},
            "unknown uncertainty method 'magic'; known are exact_dropout, posterior",
        ),
        ({"uncertainty": {"functons": 9}}, "unknown key `uncertainty.functons`; did you mean `uncertainty.functions`?"),
        ({"uncertainty": {"functions": 1}}, "`functions` must be at least 2, got 1"),
        ({"uncertainty": {"functions": "few"}}, "`uncertainty.functions`: .*valid integer.*got 'few'"),
        ({"uncertainty": {"method": "heads", "rate": 0.3}}, "unknown key `uncertainty.rate`"),
        ({"uncertainty": {"method": "masks"}}, "needs a rate above 0 in `dropout`: there is nothing to sample"),
    ],
)
def test_each_mistake_is_named(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**MINIMAL, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"stage_one": {"epochs": 3, "batch_size": 2}},
            "unknown key `stage_one`; stages are gone: `epochs` and `patience` stand by themselves",
        ),
        ({"stage_two": {"epochs": 3}}, "unknown key `stage_two`; the second stage is gone"),
        ({"posterior": {"frames": 3}}, r"unknown key `posterior`; the posterior is `uncertainty: \{method: posterior"),
        (
            {"model": {"n_heads": 3}},
            r"unknown key `model.n_heads`; a shallow ensemble is `uncertainty: \{method: heads",
        ),
        (
            {"dropout": {"bank": 3}},
            r"unknown key `dropout.bank`; masks that are trained are `uncertainty: \{method: masks",
        ),
        ({"dropout": {"bank_seed": 3}}, r"`dropout.bank_seed`; .*`uncertainty: \{method: masks, seed"),
    ],
)
def test_keys_of_earlier_versions_say_where_they_went(change: dict, message: str) -> None:
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


def test_stage_one_of_earlier_versions_is_read() -> None:
    with pytest.warns(UserWarning, match="`stage_one` is read as `epochs` and `patience`"):
        config = parse_config({**MINIMAL, "stage_one": {"epochs": 3, "patience": 2}})
    assert (config.epochs, config.patience) == (3, 2)
    with pytest.raises(ConfigError, match="unknown key `stage_one`"):
        parse_config({**MINIMAL, "stage_one": {"epochs": 3}, "epochs": 4})
