"""What tests share: problems, tiny trainings, small datasets."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
