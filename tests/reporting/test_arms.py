"""Arms side by side: the paired interval, what is said of few seeds, and what a sweep's folder lacks."""

import json
import math
import re
from pathlib import Path

import pytest
from scipy import stats

from dan_fast.reporting.arms import MEAN_OF_TARGETS, read_comparison
from dan_fast.reporting.differences import paired_difference
from dan_fast.reporting.html import ABSENT
from dan_fast.training.reported import CHOSEN
from tests.support.fake_runs import with_results
from tests.support.figures import evaluation

# By seed, in percent. Differences to plain: 2, 3 and 1; seed 7 and seed 9 have no partner.
PLAIN = {2: 44.0, 0: 40.0, 1: 48.0, 9: 10.0}
DAN = {7: 98.0, 0: 42.0, 1: 51.0, 2: 45.0}


def words(text: str) -> str:
    """Without what makes columns of one width."""
    return re.sub("-{3,}", "---", re.sub(" +", " ", text))


def finished(folder: Path, arm: str, seed: int, *targets: dict, **entry) -> dict:
    name = f"{arm},run.seed={seed}"
    (folder / name).mkdir(parents=True)
    (folder / name / "results.json").write_text(json.dumps({"targets": targets, "iterations": 120}))
    return {"name": name, "arm": arm, "seed": seed, "baseline": "plain", "state": "finished", "sentence": "",
            "seconds": 60.0, "recipe": f"recipe {arm}", **entry}  # fmt: skip


def written(folder: Path, entries: list[dict]) -> Path:
    (folder / "sweep.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """plain and dan over the seeds above, on two targets; of the second one R1 is the mAP of the first."""
    entries = []
    for arm, scores in (("plain", PLAIN), ("dan", DAN)):
        for seed, score in scores.items():
            targets = evaluation("street", (score + 10) / 100, score / 100), evaluation("mall", score / 100, 0.2)
            entries.append(finished(tmp_path / "ab", arm, seed, *targets, seconds=60.0 + seed))
    return written(tmp_path / "ab", entries)


def test_the_interval_is_that_of_the_paired_differences():
    found = paired_difference(DAN, PLAIN)
    # By hand: mean 2, deviation 1, three pairs, and 4.303 is the 97.5 % quantile of Student's t with 2 degrees.
    assert found.seeds == (0, 1, 2) and found.mean == pytest.approx(2.0)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)
    theirs = stats.ttest_rel([DAN[seed] for seed in range(3)], [PLAIN[seed] for seed in range(3)])
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    back = paired_difference(PLAIN, DAN)
    assert (back.mean, back.low, back.high) == pytest.approx((-found.mean, -found.high, -found.low))


def test_few_seeds_say_less():
    assert paired_difference({0: 3.0}, {0: 1.0}) == (2.0, None, None, (0,))
    assert paired_difference({0: 3.0}, {1: 1.0}) is None
    low, high = paired_difference({0: 3.0, 1: 2.0}, {0: 1.0, 1: 1.0})[1:3]
    # Two seeds: one degree of freedom, whose quantile is 12.706.
    assert (high - low) / 2 == pytest.approx(12.7062 * math.sqrt(0.5) / math.sqrt(2), abs=1e-4)


def test_a_sweep_is_compared_by_target_and_over_the_mean_of_them(folder):
    comparison = read_comparison(folder)
    assert [target.title for target in comparison.targets] == ["street", "mall", MEAN_OF_TARGETS.title]
    plain, dan = comparison.arms
    street, mall, mean = comparison.targets
    assert dan.scores(street, "mAP") == pytest.approx(DAN) and dan.scores(mall, "R1") == pytest.approx(DAN)
    assert dan.scores(mean, "mAP") == pytest.approx({seed: (score + 20) / 2 for seed, score in DAN.items()})
    assert comparison.difference(dan, street, "R1").mean == pytest.approx(2.0)
    assert comparison.difference(dan, mean, "mAP").mean == pytest.approx(1.0)
    assert comparison.difference(plain, street, "mAP") is None

    content = json.loads(json.dumps(comparison.to_dict()))
    row = content["targets"][0]["arms"][1]
    assert (row["arm"], content["baseline"]) == ("dan", "plain")
    assert row["mAP"]["by_seed"]["1"] == pytest.approx(51.0)
    # The sample deviation of 98, 42, 51 and 45.
    assert (row["mAP"]["mean"], row["mAP"]["std"]) == pytest.approx((59.0, 26.2679), abs=1e-3)
    assert row["mAP"]["difference"]["seeds"] == [0, 1, 2]
    assert content["arms"][1]["runs"]["2"] == {"iterations": 120, "seconds": 62.0}


def test_the_markdown_can_be_pasted(folder):
    text = words(read_comparison(folder).markdown())
    how = "fixed query and gallery, 30 queries, 40 gallery images"
    assert f"### ab: street ({how})" in text and "### ab: Mean of the unseen targets\n" in text
    assert "| arm | seeds | mAP (%) | R1 (%) | mAP over plain | R1 over plain | iterations | s a run |" in text
    assert "| plain | 4 | 35.5 ± 17.3 | 45.5 ± 17.3 | baseline | baseline | 120 | 63 |" in text
    interval = "+2.0 [-0.5, +4.5], 3 seeds in both"
    assert f"| dan | 4 | 59.0 ± 26.3 | 69.0 ± 26.3 | {interval} | {interval} | 120 | 62 |" in text
    assert "- dan: recipe dan." in text and "95 % interval (Student's t)" in text and "One seed" not in text


def test_what_an_arm_sets_and_how_long_it_trained_is_said(tmp_path):
    entries = [
        finished(tmp_path, "plain", 0, evaluation("street", 0.5, 0.4), settings={"run.seed": 0}),
        finished(
            tmp_path,
            "dan",
            0,
            evaluation("street", 0.6, 0.5),
            recipe="recipe dan, with meta.order=2",
            settings={"recipe": "dan", "meta.order": 2, "data.batch_size": 32, "model.adversary": True},
        ),
    ]
    notes = read_comparison(written(tmp_path, entries)).notes()
    assert "plain: recipe plain." in notes
    assert "dan: recipe dan, with meta.order=2, data.batch_size=32, model.adversary=true." in notes
    assert not any("differ in their iterations" in note for note in notes)
    with_results(tmp_path / "dan,run.seed=0", iterations=160)
    notes = read_comparison(tmp_path).notes()
    assert any("differ in their iterations (plain 120, dan 160): data.iterations makes" in note for note in notes)


def test_an_entry_that_the_last_grid_did_not_plan_is_passed_over(folder):
    entries = json.loads((folder / "sweep.json").read_text())
    for entry in entries:
        entry["planned"] = entry["seed"] != 1
    assert {seed for arm in read_comparison(written(folder, entries)).arms for seed in arm.runs} == {0, 2, 7, 9}


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    entries = [
        finished(tmp_path, arm, 0, evaluation("street", 0.5, score)) for arm, score in (("plain", 0.30), ("dan", 0.31))
    ]
    text = words(read_comparison(written(tmp_path, entries)).markdown())
    assert "| dan | 1 | 31.0 | 50.0 | +1.0 | +0.0 |" in text
    assert "One seed: there is neither a deviation nor an interval" in text and "[" not in text
    assert MEAN_OF_TARGETS.title not in text, "there is one target"


def test_what_is_missing_is_named(tmp_path):
    street = evaluation("street", 0.5, 0.3)
    failed = finished(tmp_path, "dan", 1, state="failed", sentence="There is no such thing.")
    waiting = finished(tmp_path, "paper", 0, street, state="waiting", seconds=None)
    silent = finished(tmp_path, "paper", 1)
    broken = finished(tmp_path, "dan", 2)
    (tmp_path / broken["name"] / "results.json").write_text("{]")
    entries = [finished(tmp_path, "plain", 0, street), finished(tmp_path, "plain", 1, street),
               finished(tmp_path, "dan", 0, street), failed, broken, waiting, silent]  # fmt: skip
    comparison = read_comparison(written(tmp_path, entries))
    text = words(comparison.markdown())
    assert "- Missing: dan, seed 1: failed: There is no such thing." in text
    assert "- Missing: paper, seed 0: waiting." in text
    assert "- Missing: paper, seed 1: it was tested on nothing" in text
    assert "- Missing: dan, seed 2: " in text and "holds no results of this version" in text
    assert "| paper | 0 | – | – | – | – | – | – |" in text
    assert "| dan | 1 | 30.0 | 50.0 | +0.0 | +0.0 | 120 | 60 |" in text
    assert comparison.to_dict()["arms"][2]["missing"].keys() == {"0", "1"}


def test_the_mean_says_that_an_epoch_was_chosen_on_a_target(folder):
    for results in folder.glob("*/results.json"):
        with_results(results.parent, {"epoch": f"epoch 2 of 3, {CHOSEN}"})
    comparison = read_comparison(folder)
    assert [target.protocol for target in comparison.targets if target.title == MEAN_OF_TARGETS.title] == [CHOSEN]
    assert comparison.targets[-1].title == MEAN_OF_TARGETS.title
    assert f"{MEAN_OF_TARGETS.title} ({CHOSEN})" in comparison.markdown()


@pytest.mark.parametrize(
    ("labeled", "target", "known_cameras"),
    [
        (["campus"], "campus", False),
        (["campus (detected, new protocol)"], "campus", False),
        (["data (1)/market1501"], "Market-1501-v15.09.15", False),
        (["a/cuhk03 (detected, new protocol)"], "b/CUHK03", False),
        # Of which the first weights say so.
        ([], "night", True),
    ],
)
def test_the_mean_leaves_out_what_a_run_learnt_from(folder, labeled, target, known_cameras):
    for results in folder.glob("*/results.json"):
        content = json.loads(results.read_text())
        variant = {"variant": "labeled, new protocol", "known_cameras": known_cameras}
        content["targets"].append(evaluation(target, 0.9, 0.9) | variant)
        results.write_text(json.dumps({**content, "labeled": labeled}))
    comparison = read_comparison(folder)
    assert comparison.arms[1].scores(MEAN_OF_TARGETS, "mAP")[0] == pytest.approx((42.0 + 20.0) / 2)
    title = f"{target} (labeled, new protocol)"
    assert [each.title for each in comparison.targets] == ["street", "mall", title, MEAN_OF_TARGETS.title]
    said = f"No unseen targets, because trainings learnt from sets of their name: {title}."
    assert said in comparison.notes()


@pytest.mark.parametrize(
    "content",
    [None, "{]", "[]", '["x"]', '[{"arm": "plain"}]', '[{"name": "meta.eta=1", "state": "finished"}]', "{}", "no JSON"],
)
def test_what_is_no_record_of_a_sweep_compares_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    assert read_comparison(tmp_path) is None


def under(torch: str, device: str = "a CPU", threads: int = 2) -> dict:
    return {"dan_fast": "0.1.0", "torch": torch, "extension": None, "device": device, "threads": threads}


def ran(folder: Path, *processes: dict) -> None:
    """Has all results but those of plain and dan with seed 0 come from a process of torch 2.11; those from these."""
    for results in folder.glob("*/results.json"):
        of_run = list(processes) if results.parent.name.endswith("seed=0") else [under("2.11.0")]
        with_results(results.parent, ran_under=of_run)


@pytest.mark.parametrize("processes", [[under("2.12.0")], [under("2.11.0"), under("2.12.0")]])
def test_several_versions_are_said(folder, processes):
    said = "Trainings ran under several versions: torch 2.11.0, 2.12.0."
    ran(folder, *processes)
    assert said in read_comparison(folder).notes()
    # What older results do not tell is no difference.
    ran(folder, under("2.11.0"))
    (folder / "plain,run.seed=0/results.json").write_text((folder / "dan,run.seed=0/results.json").read_text())
    older = folder / "plain,run.seed=1/results.json"
    content = json.loads(older.read_text())
    del content["ran_under"]
    older.write_text(json.dumps(content))
    assert not [note for note in read_comparison(folder).notes() if "versions" in note]


def test_other_images_of_the_same_datasets_are_said(folder):
    for results in folder.glob("*/results.json"):
        named = {"labeled": ["mall"], "unlabeled": [], "unlabeled_share": 1.0}
        with_results(results.parent, **named, fingerprint="b" if results.parent.name == "dan,run.seed=0" else "a")
    said = [note for note in read_comparison(folder).notes() if "learnt from other images" in note]
    assert len(said) == 1 and said[0].count(" against ") == 1 and " against dan, seed 0; if" in said[0]
    # The seed decides which are a share of them.
    for results in folder.glob("*/results.json"):
        with_results(results.parent, unlabeled_share=0.5, fingerprint=results.parent.name.partition("seed=")[2])
    assert not [note for note in read_comparison(folder).notes() if "other images" in note]


def test_other_images_or_labels_that_were_tested_on_are_said(folder):
    assert not [note for note in read_comparison(folder).notes() if "other images" in note]  # older results have none
    for results in folder.glob("*/results.json"):
        with_results(results.parent, {"fingerprint": "b" if results.parent.name == "dan,run.seed=0" else "a"})
    said = [note for note in read_comparison(folder).notes() if "tested on other images or labels" in note]
    assert len(said) == 1 and " of street: plain, seed 2 and " in said[0] and " against dan, seed 0; if" in said[0]


@pytest.mark.parametrize(
    ("entry", "processes", "shown"),
    [
        ({}, [], ["63", "62"]),
        ({"threads": 1}, [], [ABSENT, ABSENT]),
        ({"device": "cuda"}, [], [ABSENT, ABSENT]),
        # What the training found says more than auto, and no number of threads.
        ({"threads": None, "device": "auto"}, [under("2.11.0")], ["63", "62"]),
        ({}, [under("2.11.0", device="a GPU")], [ABSENT, ABSENT]),
        ({}, [under("2.11.0", threads=4)], [ABSENT, ABSENT]),
        # What went on elsewhere has no seconds; it takes none from the others.
        ({}, [under("2.11.0"), under("2.11.0", device="a GPU")], ["64", "63"]),
    ],
)
def test_seconds_of_other_threads_or_devices_are_not_set_side_by_side(folder, entry, processes, shown):
    """By the record of the sweep, and by the results where they say it."""
    first, *others = json.loads((folder / "sweep.json").read_text())
    usual = {"threads": 2, "device": "cpu"}
    written(folder, [first | usual | entry, *(each | usual for each in others)])
    if processes:
        ran(folder, *processes)
    found = read_comparison(folder)
    assert [row[-1] for row in found.tables()[0].rows] == shown
    assert any(note.startswith("Seconds are left out") for note in found.notes()) == (shown[0] == ABSENT)


def test_seconds_of_arms_that_ran_beside_others_and_alone_say_so(folder):
    """As where two are trained at a time and their number is odd."""
    entries = json.loads((folder / "sweep.json").read_text())

    def notes(**at_once: float) -> list[str]:
        of_all = [entry | {"seconds_of_all": at_once[entry["arm"]] * entry["seconds"]} for entry in entries]
        found = read_comparison(written(folder, of_all))
        assert [row[-1] for row in found.tables()[0].rows] == ["63", "62"]
        return [note for note in found.notes() if "at once" in note]

    assert notes(plain=1.98, dan=2.01) == []
    said = "Seconds depend on how many trainings ran at once, on average 2.0 for plain, 1.5 for dan."
    assert notes(plain=2.0, dan=1.5) == [said]
    written(folder, [entry | {"seconds_of_all": None} for entry in entries])
    assert not [note for note in read_comparison(folder).notes() if "at once" in note]
