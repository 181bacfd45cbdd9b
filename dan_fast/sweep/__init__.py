"""Grids of trainings."""

from dan_fast.sweep.runner import sweep

__all__ = ["sweep"]
