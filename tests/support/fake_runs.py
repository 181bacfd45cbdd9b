"""Folders of trainings that never ran, for pages that are made of such folders."""

import json
from pathlib import Path

import yaml
from torch.utils.tensorboard import SummaryWriter

from tests.support.figures import evaluation


def fake_run(folder: Path, results=(("street", 0.5, 0.4),), scalars=None, iterations=None, **sections) -> Path:
    """A run's folder without a checkpoint; of the settings only what is given.

    Args:
        scalars: for each tag its values, by their steps or at the steps from 0 on.
        iterations: of the whole training, in results.json.
    """
    folder.mkdir(parents=True)
    settings = {"data": {"labeled": ["x/campus"], "unlabeled": ["x/mall"]}}
    for section, values in sections.items():
        settings.setdefault(section, {}).update(values)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    epochs = settings.get("optimizer", {}).get("epochs", 500)
    content = {"epochs": epochs, "targets": [evaluation(*result) for result in results]}
    content |= {} if iterations is None else {"iterations": iterations}
    (folder / "results.json").write_text(json.dumps(content))
    if scalars:
        with SummaryWriter(folder / "tensorboard") as writer:
            for tag, values in scalars.items():
                for step, value in values.items() if isinstance(values, dict) else enumerate(values):
                    writer.add_scalar(tag, value, step)
    return folder


def with_results(folder: Path, of_target: dict | None = None, **changes: object) -> Path:
    """The folder of a run, its results.json changed; `of_target` in the figures of the first target."""
    content = json.loads((folder / "results.json").read_text())
    content["targets"][0] |= of_target or {}
    (folder / "results.json").write_text(json.dumps(content | changes))
    return folder
