"""Folders of trainings that never ran, for pages that are made of such folders."""

import json
from pathlib import Path

import yaml
from torch.utils.tensorboard import SummaryWriter


def evaluation(dataset: str, rank1: float, mean_precision: float, repeats: int = 1) -> dict:
    spread = 0.01 if repeats > 1 else None
    cmc = [rank1, *[rank1 + 0.05] * 9]
    return {
        "dataset": dataset,
        "protocol": "fixed query and gallery" if repeats == 1 else f"{repeats} random splits",
        "cmc": cmc,
        "mAP": mean_precision,
        "mINP": 0.05,
        "cmc_std": None if spread is None else [spread] * 10,
        "mAP_std": spread,
        "mINP_std": spread,
        "repeats": repeats,
        "num_query": 30,
        "num_gallery": 40,
        "num_valid": 30,
        "skipped": [],
    }


def fake_run(folder: Path, results=(("street", 0.5, 0.4),), scalars=None, **sections) -> Path:
    """A run's folder without a checkpoint; of the settings only what is given."""
    folder.mkdir(parents=True)
    settings = {"data": {"labeled": ["x/campus"], "unlabeled": ["x/mall"]}}
    for section, values in sections.items():
        settings.setdefault(section, {}).update(values)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    content = {"epochs": 500, "targets": [evaluation(*result) for result in results]}
    (folder / "results.json").write_text(json.dumps(content))
    if scalars:
        with SummaryWriter(folder / "tensorboard") as writer:
            for tag, values in scalars.items():
                for step, value in enumerate(values):
                    writer.add_scalar(tag, value, step)
    return folder
