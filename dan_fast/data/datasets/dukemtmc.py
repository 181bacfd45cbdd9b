"""DukeMTMC-reID, which was withdrawn in 2019, read from a copy that already exists.

Its makers took it down in June 2019: the people on the campus had been filmed and published without having
consented, beyond what the university's review board had allowed, and the images had found their way into
surveillance products (Exposing.ai, "Duke MTMC", 2019). It may not be redistributed, and the conferences of the field
discourage results on it; it is read here so that older figures can be checked on existing copies. No source is given.
"""

import re
from pathlib import Path

from dan_fast.data.datasets.finding import locate
from dan_fast.data.datasets.market1501 import PARTS, layout_with, read_market1501
from dan_fast.data.samples import Counts, KnownDataset

# 0001_c2_f0046182.jpg: person 1, camera 2, frame.
_OWN_NAME = re.compile(r"\d+_c\d+_f\d+")


def _find(folder: Path) -> Path | None:
    names = ("DukeMTMC-reID", "dukemtmc-reid/DukeMTMC-reID", "dukemtmcreid", "dukemtmcreid/DukeMTMC-reID")
    return locate(folder, lambda place: layout_with(place, _OWN_NAME), names, tuple(PARTS.values()))


DUKEMTMC = KnownDataset(
    name="dukemtmc",
    title="DukeMTMC-reID",
    find=_find,
    read=read_market1501,
    counts={"": {"train": Counts(702, 8, 16522), "query": Counts(702, 8, 2228), "gallery": Counts(1110, 8, 17661)}},
    source="Zheng et al., ICCV 2017",
    origin="",
    note="It was withdrawn in 2019 because the people in it had not consented; results on it are discouraged.",
)
