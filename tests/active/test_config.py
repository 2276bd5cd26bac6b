import pytest
import yaml

from forcedrop.active import load_active_config
from forcedrop.active.config import parse_active_config
from forcedrop.training import ConfigError


def values(**changes: object) -> dict:
    start = {
        "state": "state",
        "start": {"files": ["start.h5"]},
        "oracle": {"name": "emt"},
        "explore": {"temperatures": [300]},
        "stop": {"labels": 50},
    }
    return {**start, **changes}


def test_paths_are_relative_to_the_file(tmp_path) -> None:
    given = values(
        training={"data": {"isolated_atoms": "atoms.h5"}}, explore={"temperatures": [300], "start_files": ["s.xyz"]}
    )
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(given))
    config = load_active_config(tmp_path / "a.yaml")
    assert config.state == tmp_path / "state"
    assert config.start.files == [tmp_path / "start.h5"]
    assert config.explore.start_files == [tmp_path / "s.xyz"]
    training = config.train_config(
        {"train": [config.state / "labels.h5"], "validation": []}, config.state / "model", 50
    )
    assert training.data.isolated_atoms == tmp_path / "atoms.h5"
    assert training.data.train == [config.state / "labels.h5"]
    assert training.output == config.state / "model"


def test_constant_steps() -> None:
    training = {"batch_size": 4, "data": {"validation_fraction": 0.1, "calibration_fraction": 0.1}, "seed": 7}
    config = parse_active_config(values(retraining={"steps": 1000}, training=training))
    for frames, epochs in ((40, 100), (80, 50), (399, 10)):  # ⌈40/4⌉ = 10 steps an epoch
        own = config.train_config({"train": [config.state]}, config.state, frames, member=2)
        assert own.epochs == epochs
        assert own.seed == 9
    capped = parse_active_config(values(retraining={"steps": 1000, "most_epochs": 60}, training=training))
    assert capped.train_config({"train": [config.state]}, config.state, 40).epochs == 60
    plain = parse_active_config(values(training={"epochs": 33}))
    assert plain.train_config({"train": [config.state]}, config.state, 50).epochs == 33


def test_steps_by_round() -> None:
    config = parse_active_config(values(retraining={"steps": [1000, 500]}, training={"batch_size": 4}))
    epochs = [config.train_config({"train": [config.state]}, config.state, 40, n).epochs for n in (1, 2, 3)]
    assert epochs == [100, 50, 50]


def test_fine_tuning_has_steps_and_rates_of_its_own() -> None:
    training = {"optimiser": {"learning_rate": 0.04, "adam_learning_rate": 0.01}, "batch_size": 4}
    config = parse_active_config(
        values(retraining={"steps": 1000, "fine_tune_steps": 200, "fine_tune_rate": 0.5}, training=training)
    )
    first = config.train_config({"train": [config.state]}, config.state, 40)
    later = config.train_config({"train": [config.state]}, config.state, 40, start=config.state / "model.pt")
    assert (first.epochs, first.optimiser.learning_rate, first.start) == (100, 0.04, None)
    assert (later.epochs, later.start) == (20, config.state / "model.pt")
    assert (later.optimiser.learning_rate, later.optimiser.adam_learning_rate) == (0.02, 0.005)


def test_batches_by_round() -> None:
    config = parse_active_config(values(pick={"batch": [5, 10]}))
    assert [config.pick.size(n) for n in (1, 2, 3, 9)] == [5, 10, 10, 10]
    assert parse_active_config(values()).pick.size(4) == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"explore": {"temperature": [300]}}, "unknown key `explore.temperature`; did you mean `explore.temperatures`"),
        ({"explore": {"temperature": [300]}}, "missing key `explore.temperatures`"),
        ({"stopp": 1}, "unknown key `stopp`; did you mean `stop`"),
        ({"training": {"output": "x"}}, "`training` must not hold `output`: the loop sees to it"),
        ({"training": {"start": "model.pt"}}, "`training` must not hold `start`: the loop sees to it"),
        ({"training": {"data": {"calibration": ["x"]}}}, "`training` must not hold `data.calibration`"),
        ({"training": {"data": {"train": ["x"]}}}, "`training` must not hold `data.train`"),
        ({"training": {"epoch": 3}}, "unknown key `epoch`; did you mean `epochs`"),
        (
            {"training": {"stage_one": {"epochs": 3, "seed": 1}}},
            "unknown key `stage_one`; stages are gone: `epochs` and `patience` stand",
        ),
        ({"training": {"uncertainty": {"method": "none"}}}, "gives no error bars to pick by"),
        ({"training": {"data": {"calibration_fraction": 0}}}, "`training.data.calibration_fraction` must not be 0"),
        (
            {"pick": {"strategy": "best"}},
            "`pick.strategy`: Input should be 'uncertain', 'informative', 'random' or 'committee', got 'best'",
        ),
        ({"pick": {"batch": 3, "check": 4}}, "`batch` must be positive and at least `check`"),
        ({"retraining": {"steps": [100, 0]}}, "`steps` must be positive, got [100, 0]"),
        ({"retraining": {"steps": []}}, "`steps` must be positive, got []"),
        ({"label": {"timeout": 0}}, "`label.timeout`: Input should be greater than 0, got 0"),
    ],
)
def test_mistakes(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_active_config(values(**changes))
    assert message in str(caught.value)


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_active_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="must hold keys and values, got list"):
        load_active_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_active_config(tmp_path / "a.yaml")
