"""The gains that the pages name first are those of the committed trainings."""

import json
from collections import defaultdict
from statistics import fmean

import pytest

from dan_fast.reporting.differences import paired_difference
from tests.support import in_checkout

RESULTS = in_checkout("benchmarks/results/experiments")
M, K = ("Market-1501-dev",), ("CUHK03-dev",)
README, EXPERIMENTS, TRIED = "README.md", "docs/experiments.md", "docs/tried.md"
DAN, PLAIN, FEW = "dan_instance_norm", "plain_instance_norm", "dan_instance_norm_labeled_slots_300"
TWO = ("dan_two_sources_instance_norm", "plain_two_sources_instance_norm")
LARGER = {"image_size": [256, 128]}
# An arm, the one it is over, what their runs have, the sources of whose trainings it is, and the pages that say it.
GAINS = [
    (DAN, PLAIN, {"iterations": 900}, [M, K], [README, EXPERIMENTS]),
    (DAN, PLAIN, {"iterations": 900}, [M], [README, EXPERIMENTS]),
    (DAN, PLAIN, {"iterations": 900}, [K], [README, EXPERIMENTS]),
    (DAN, PLAIN, {"iterations": 3600}, [M], [README, EXPERIMENTS]),
    (FEW, PLAIN, {"iterations": 900}, [M, K], [TRIED]),
    (FEW, PLAIN, {"iterations": 3600}, [M], [README, EXPERIMENTS, TRIED]),
    (FEW, DAN, {"iterations": 3600}, [M], [EXPERIMENTS, TRIED]),
    (*TWO, {"iterations": 900}, [M + K], [README, EXPERIMENTS]),
    (*TWO, {"iterations": 1800}, [M + K], [README, EXPERIMENTS]),
    ("dan", "plain", {"iterations": 450, **LARGER}, [M, K], [README, EXPERIMENTS]),
    ("dan_street_instance_norm", DAN, {"iterations": 900}, [M], [README, EXPERIMENTS]),
    ("dan_street_instance_norm", DAN, {"iterations": 900}, [K], [README, EXPERIMENTS]),
    (DAN, "dan", {"iterations": 900}, [M, K], [README, EXPERIMENTS]),
    (PLAIN, "plain", {"iterations": 900}, [M, K], [README, EXPERIMENTS]),
]


def runs(file: str) -> list[dict]:
    return json.loads((RESULTS / file).read_text())["runs"]


def by_training(found: list[dict], arm: str, wanted: dict) -> dict[tuple, float]:
    """The mean mAP of VIPeR and PRID by sources and seed; of a seed that was trained more than once the mean."""
    figures = defaultdict(list)
    for run in found:
        of_arm = run["arm"].removesuffix("_earlier_code") == arm and ("image_size" in run) == ("image_size" in wanted)
        if of_arm and wanted.items() <= run.items():
            figures[*run["labeled"], run["seed"]].append(fmean(run["mAP"][target] for target in ("VIPeR", "PRID")))
    return {training: fmean(each) for training, each in figures.items()}


def said(mean: float, low: float, high: float) -> str:
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


@pytest.mark.parametrize(("arm", "baseline", "wanted", "sources", "pages"), GAINS)
def test_a_gain_is_that_of_the_trainings(arm: str, baseline: str, wanted: dict, sources: list, pages: list[str]):
    found = runs("variants.json")
    over, under = (by_training(found, name, wanted) for name in (arm, baseline))
    gain = paired_difference({key: value for key, value in over.items() if key[:-1] in sources}, under)
    for page in pages:
        # README says what instance norm gives without a sign.
        assert said(*gain[:3]).lstrip("+") in in_checkout(page).read_text(), page


def test_what_features_gain_is_that_of_their_networks():
    figures = defaultdict(dict)
    for run in runs("features.json"):
        network = run["arm"], *run["labeled"], run["iterations"], run["seed"]
        figures[run["feature"]][network] = fmean(run["mAP"][target] for target in ("VIPeR", "PRID"))
    whitened = {network: value for network, value in figures["pooled_whitened"].items() if "slots" not in network[0]}
    root = paired_difference(figures["pooled_root"], figures["pooled"])
    assert (len(root.seeds), len(whitened)) == (26, 11)
    dan, plain = (
        {network[1:]: value for network, value in figures[feature].items() if network[0] == arm and network[2] == 900}
        for feature, arm in (("pooled_whitened", DAN), ("pooled_root", PLAIN))
    )
    as_tested = paired_difference(dan, plain)
    assert len(as_tested.seeds) == 10
    for gain in (root, paired_difference(whitened, figures["pooled_root"]), as_tested):
        assert all(said(*gain[:3]) in in_checkout(page).read_text() for page in (README, EXPERIMENTS))
    assert "in both, twenty-six networks; whitened by M in dan, eleven networks" in in_checkout(EXPERIMENTS).read_text()
