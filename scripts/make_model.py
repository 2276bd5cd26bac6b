"""Train the model that ships in ``data/ethanol.pt``, by ``examples/configs/ethanol.yaml``; two minutes on two cores."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from forcedrop.report import describe_model
from forcedrop.training import load_config, train

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Train, and copy the model to its place."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    config = load_config(ROOT / "examples" / "configs" / "ethanol.yaml")
    model = train(config, resume=(config.output / "last.pt").exists())
    shutil.copyfile(config.output / "model.pt", ROOT / "data" / "ethanol.pt")
    print(describe_model(model))


if __name__ == "__main__":
    main()
