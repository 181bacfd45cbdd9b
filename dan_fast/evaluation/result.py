"""The result of scoring one embedding on one dataset: its figures and the conditions that they belong to."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# The figures that tables, lines and files of results show, in this order.
COLUMNS = ("R1", "R5", "R10", "mAP", "mINP")


@dataclass(frozen=True)
class Evaluation:
    """Figures of an embedding on a dataset, as fractions, and the conditions that they belong to.

    Attributes:
        dataset: its name.
        protocol: which images were queries and how often, in words.
        cmc, mAP, mINP: means over the repeats; ``cmc[k - 1]`` is rank-k accuracy.
        cmc_std, mAP_std, mINP_std: sample standard deviations over the repeats, None where there was one.
        repeats: number of splits scored.
        num_query, num_gallery, num_valid: images searched for, searched in, and queries that have a match, in the last
            split.
        skipped: files that could not be decoded and were left out.
        variant: of the dataset, in words, "" where it has only one.
        splits: name and hash of the fixed splits that were scored, "" for any others.
        named_protocol: name of the protocol of the literature by which the network was trained and tested, "" for none.
        epoch: of the weights, and whether it was chosen on the target, in words; "" where that is not known.
        recipe: of the training, and what was changed on top of it, in words; "" for none.
        metric: the metric by which features were compared; "" where that was not recorded.
        ap: which average precision was taken; "" where that was not recorded.
        precision: the precision in which the network ran, "float32" or "bfloat16"; "" where that is not known.
        rounding: how the device rounds float32 numbers all the same, in words ("TF32 in convolutions"); "" for none.
        seen: how many of the tested persons the network was trained on, in words; "" for none, as far as known.
        unmatched: queries without a match, of all splits together, which are left out.
        known_cameras: whether the network was trained on images of the set that the dataset belongs to, as far as
            known.
        fingerprint: SHA-256 (hex) of relative paths, persons, cameras and splits of the images, wherever the folder
            lies; "" where that was not recorded.
    """

    dataset: str
    protocol: str
    cmc: tuple[float, ...]
    mAP: float
    mINP: float
    cmc_std: tuple[float, ...] | None
    mAP_std: float | None
    mINP_std: float | None
    repeats: int
    num_query: int
    num_gallery: int
    num_valid: int
    skipped: tuple[str, ...] = ()
    variant: str = ""
    splits: str = ""
    named_protocol: str = ""
    epoch: str = ""
    recipe: str = ""
    metric: str = ""
    ap: str = ""
    precision: str = ""
    rounding: str = ""
    seen: str = ""
    unmatched: int = 0
    # Older results do not say these two, and yet are the same figures.
    known_cameras: bool = field(default=False, compare=False)
    fingerprint: str = field(default="", compare=False)

    @property
    def scoring(self) -> str:
        """Metric, AP and precision where they are not the defaults, in words; "" where all are."""
        parts = (
            f"{self.metric} distance" if self.metric not in ("", "cosine") else "",
            f"{self.ap} AP" if self.ap not in ("", "standard") else "",
            self.precision if self.precision != "float32" else "",
        )
        return "; ".join(filter(None, parts))

    @property
    def conditions(self) -> str:
        """The conditions that figures must share to be compared: protocol, splits, scoring, images and epoch.

        Of metric, AP and precision it names those that are not the default.
        """
        splits = " in all splits together" if self.repeats > 1 else ""
        parts = (
            self.named_protocol,
            self.protocol,
            f"{len(self.skipped)} broken images left out" if self.skipped else "",
            f"{self.unmatched} queries without a match left out{splits}" if self.unmatched else "",
            self.scoring,
            self.rounding,
            self.epoch,
            self.seen,
        )
        return "; ".join(filter(None, parts))

    @property
    def conditions_and_recipe(self) -> str:
        """The conditions and, where the training had one, the recipe that is compared under them."""
        return "; ".join(filter(None, (self.conditions, self.recipe)))

    @property
    def title(self) -> str:
        """The dataset and its variant, as they stand beside every figure."""
        return f"{self.dataset} ({self.variant})" if self.variant else self.dataset

    def percentages(self) -> dict[str, float]:
        """The values of :data:`COLUMNS` by name, in percent."""
        return self._columns(self.cmc, self.mAP, self.mINP)

    def row(self) -> tuple[str, ...]:
        """The values of :data:`COLUMNS` as text in percent, ``63.2`` or ``63.2 ± 1.1``."""
        means = self.percentages()
        if self.cmc_std is None:
            return tuple(f"{means[column]:.1f}" for column in COLUMNS)
        stds = self._columns(self.cmc_std, self.mAP_std, self.mINP_std)
        return tuple(f"{means[column]:.1f} ± {stds[column]:.1f}" for column in COLUMNS)

    @property
    def figures(self) -> str:
        """`row` as one line."""
        return ", ".join(f"{column} {value}" for column, value in zip(COLUMNS, self.row(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The attributes as plain numbers, strings and lists, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evaluation":
        """The evaluation that `to_dict` gave; entries that are no attributes are ignored.

        Raises:
            TypeError, ValueError: an attribute is missing, or a figure is no number.
        """
        known = {each.name for each in fields(cls)} & values.keys()
        found = cls(**{key: tuple(values[key]) if isinstance(values[key], list) else values[key] for key in known})
        found.row()
        return found

    @staticmethod
    def _columns(cmc: tuple[float, ...], m_ap: float, m_inp: float) -> dict[str, float]:
        found = {f"R{rank}": share for rank, share in enumerate(cmc, start=1)} | {"mAP": m_ap, "mINP": m_inp}
        # A curve that ends before rank 5 or 10 has no value there.
        return {column: 100 * found.get(column, math.nan) for column in COLUMNS}
