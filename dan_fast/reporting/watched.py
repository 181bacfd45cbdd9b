"""What to watch in training: the scalars that show problems early, and what to look for in each."""

from collections.abc import Sequence

import numpy as np

from dan_fast.reporting.html import ABSENT, Table
from dan_fast.reporting.runs import Run

# Scalar: what it is, and what to look for.
WATCHED = {
    "competition/ties": (
        "share of iterations in which both branches were equally accurate on S",
        "near 1 accuracy no longer decides who wins, cross-entropy does; meta.tie both has both groups updated",
    ),
    "competition/backbone_frozen": (
        "share of iterations with a frozen backbone",
        "where it stays high the network learns in the other iterations only; lower meta.stall_guard",
    ),
    "train/logit_norm/attention": (
        "mean norm of the logits, attention branch",
        "far below the adversary's, the attention scales features down and loses ties by its cross-entropy",
    ),
    "train/logit_norm/adversary": (
        "mean norm of the logits, adversary branch",
        "compare with the attention branch's; growth without end is overconfidence",
    ),
    "attention/spatial_spread": (
        "spread of A_S, max - min within an image",
        "near 0 the spatial attention is flat and does nothing",
    ),
    "memory/slots_unlabeled": (
        "slots of M′ in use",
        "few of those there are: samples leave M′ as false ones as fast as they come",
    ),
    "memory/cleared_a_sample": (
        "samples that leave M′, dropped as false or replaced, for each one written",
        "below 1 M′ fills, at 1 it holds its size, above 1 it shrinks",
    ),
    "pseudo/purity": (
        "share of companions under one pseudo label in M′ that show the same person",
        "where the truth is known; low: M′ feeds back a mixture of persons",
    ),
    "pseudo/fed_back_right": (
        "share of fed-back images whose pseudo label is right",
        "where the truth is known; persons who are not labelled are always wrong, so 0 for sets of their own persons",
    ),
    "train/loss/labeled_embedding": (
        "labelled images in M, weighted loss",
        "0 unless loss.labeled_embedding is set; should fall",
    ),
}


def watched_table(runs: Sequence[Run]) -> Table | None:
    """First and last value of every scalar of `WATCHED` that any of the runs has logged; None where none has."""
    tags = [tag for tag in WATCHED if any(_has(run, tag) for run in runs)]
    if not tags:
        return None
    shown = [run for run in runs if any(tag in run.scalars for tag in tags)]
    rows = [[WATCHED[tag][0], *(_from_to(run.scalars.get(tag)) for run in shown), WATCHED[tag][1], tag] for tag in tags]
    columns = ["what", *(run.name for run in shown), "what to look for", "scalar"]
    return Table("What to watch in training", columns, rows, "First to last value that a run logged; – : not logged.")


def _has(run: Run, tag: str) -> bool:
    """Whether a run logged it and has what it is of: an adversary beside the branch, a memory that is written to."""
    beside = {"train/logit_norm/attention": "train/logit_norm/adversary"}.get(tag, tag)
    curve = run.scalars.get(tag)
    return curve is not None and beside in run.scalars and (tag != "memory/slots_unlabeled" or bool(curve[1].any()))


def _from_to(curve: tuple[np.ndarray, np.ndarray] | None) -> str:
    return ABSENT if curve is None else f"{curve[1][0]:.3g} → {curve[1][-1]:.3g}"
