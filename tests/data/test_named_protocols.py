"""Protocols by name: which images of which datasets they take, and what they say where something is missing."""

import io
import json
import logging
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from dan_fast.commands.protocols import list_protocols
from dan_fast.core.errors import DanFastError
from dan_fast.data import ReIDDataset, TrainingSet
from dan_fast.data import named_protocols as module
from dan_fast.data.datasets.fixed_splits import DIGESTS
from dan_fast.data.datasets.known import KNOWN, find_datasets
from dan_fast.data.named_protocols import PROTOCOLS, protocol_of, resolve_protocol
from tests.support.dataset_shelf import CUHK02, CUHK03, CUHK_SYSU, DUKE, MARKET, MSMT17, Shelf, full_shelf
from tests.support.refusals import refusal

NAMES = {
    *("table4", "table4-wo-unlabeled", "table6-market-to-duke", "table6-duke-to-market", "p1"),
    *(f"table5-{way}{end}" for way in ("market-to-duke", "duke-to-market") for end in ("", "-wo-unlabeled")),
    *(f"p{number}-{target}" for number in (2, 3) for target in ("market1501", "msmt17", "cuhk03")),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_shelf(tmp_path_factory.mktemp("shelf") / "datasets").root


def sizes(datasets: Iterable[ReIDDataset]) -> dict[str, int]:
    return {dataset.title: len(dataset.train) for dataset in datasets}


def sentence(name: str, root: Path, **options: bool) -> str:
    return refusal(resolve_protocol, name, root, **options)


def count(parts: dict[str, list]) -> int:
    return sum(map(len, parts.values()))


# Which datasets, and which of their images


def test_the_protocols_are_those_of_the_paper_and_of_today() -> None:
    assert set(PROTOCOLS) == NAMES
    assert all(protocol.name == name for name, protocol in PROTOCOLS.items())
    for protocol in PROTOCOLS.values():
        for part in (*protocol.labeled, *protocol.unlabeled, *protocol.targets):
            assert set(part.variants) <= set(KNOWN[part.dataset].counts), part
    with pytest.raises(DanFastError, match="no protocol 'table7'; choose one of table4, table4-wo-unlabeled, .*p3"):
        protocol_of("table7")


def test_each_known_dataset_lies_on_the_shelf_and_is_taken_for_no_other(root: Path) -> None:
    found = {(each.path.relative_to(root).parts[0], each.known.name) for each in find_datasets(root)}
    left = KNOWN.keys() - {name for _, name in found}
    assert not left, f"draw {', '.join(left)} by a method of Shelf in tests/support/dataset_shelf.py"
    assert len({folder for folder, _ in found}) == len(found), found


def test_table_4_takes_all_images_of_five_sources_with_and_without_msmt17(root: Path) -> None:
    roles = resolve_protocol("table4", root)
    assert sizes(roles.labeled) == {
        "CUHK02 (all images)": len(CUHK02),
        "CUHK03 (detected, new protocol, all images)": count(CUHK03),
        # Neither distractor nor junk.
        "Market-1501 (all images)": count(MARKET) - 2,
        "DukeMTMC-reID (all images)": count(DUKE),
        "CUHK-SYSU (all images)": len(CUHK_SYSU),
    }
    assert sizes(roles.unlabeled) == {"MSMT17 (V1, all images)": count(MSMT17)}
    without = resolve_protocol("table4-wo-unlabeled", root)
    assert without == roles._replace(unlabeled=())
    assert TrainingSet(roles.labeled, roles.unlabeled).num_classes == 4 + 4 + 4 + 4 + 2


def test_the_small_four_are_tested_on_in_their_ten_fixed_splits(root: Path) -> None:
    for name in ("table4", "p1"):
        targets = resolve_protocol(name, root).targets
        assert [target.title for target in targets] == ["VIPeR", "PRID", "GRID", "i-LIDS"]
        assert [target.splits.digest for target in targets] == [DIGESTS[n] for n in ("viper", "prid", "grid", "ilids")]
        assert all(len(target.splits.splits) == 10 for target in targets)


def test_p1_takes_hand_drawn_boxes_and_no_duke(root: Path) -> None:
    roles = resolve_protocol("p1", root)
    assert sizes(roles.labeled) == {
        "Market-1501 (all images)": count(MARKET) - 2,
        "CUHK02 (all images)": len(CUHK02),
        "CUHK03 (labeled, new protocol, all images)": count(CUHK03) + 1,
        "CUHK-SYSU (all images)": len(CUHK_SYSU),
    }
    assert roles.unlabeled == ()


def test_p2_takes_train_splits_and_p3_all_images_of_all_but_the_target(root: Path) -> None:
    market, msmt, cuhk = "Market-1501", "MSMT17 (V1)", "CUHK03 (labeled, new protocol)"
    train = {market: 4, msmt: 4, cuhk: 5}
    whole = {market: count(MARKET) - 2, msmt: count(MSMT17), cuhk: count(CUHK03) + 1}
    for target, name in ((market, "market1501"), (msmt, "msmt17"), (cuhk, "cuhk03")):
        second, third = resolve_protocol(f"p2-{name}", root), resolve_protocol(f"p3-{name}", root)
        left = {title: size for title, size in train.items() if title != target}
        assert sizes(second.labeled) == {**left, "CUHK-SYSU": len(CUHK_SYSU)}
        assert sorted(sizes(third.labeled).values()) == sorted([*(whole[title] for title in left), len(CUHK_SYSU)])
        assert all("all images" in title for title in sizes(third.labeled))
        assert second.targets == third.targets and second.unlabeled == third.unlabeled == ()
        assert [each.title for each in third.targets] == [target]
        assert third.targets[0].query and third.targets[0].gallery


@pytest.mark.parametrize(("way", "source", "target"), [("market-to-duke", "Market-1501", "DukeMTMC-reID"),
                                                       ("duke-to-market", "DukeMTMC-reID", "Market-1501")])  # fmt: skip
def test_table_5_and_table_6_take_train_splits(root: Path, way: str, source: str, target: str) -> None:
    for name, unlabeled in ((f"table5-{way}", {"MSMT17 (V1)": 4}), (f"table5-{way}-wo-unlabeled", {}),
                            (f"table6-{way}", {target: 4})):  # fmt: skip
        roles = resolve_protocol(name, root)
        assert (sizes(roles.labeled), sizes(roles.unlabeled)) == ({source: 4}, unlabeled)
        assert [each.title for each in roles.targets] == [target]


def test_the_older_msmt17_for_the_paper_and_the_newer_for_today_where_both_are_there(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "both")
    for put in (shelf.market, shelf.duke, shelf.cuhk_sysu, shelf.cuhk03, shelf.msmt17):
        put()
    shelf.msmt17("V2")
    assert list(sizes(resolve_protocol("table5-market-to-duke", shelf.root).unlabeled)) == ["MSMT17 (V1)"]
    assert [target.title for target in resolve_protocol("p2-msmt17", shelf.root).targets] == ["MSMT17 (V2)"]


def test_the_published_counts_lead_to_the_choice_of_boxes() -> None:
    counts = [KNOWN[part.dataset].counts[part.variants[0]] for part in protocol_of("table4").labeled]
    # The gallery of Market-1501 has 2,798 distractors.
    assert sum(split.images for each in counts for split in each.values()) - 2798 == 121_765


def test_targets_alone_need_no_sources(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "targets")
    shelf.market()
    roles = resolve_protocol("p3-market1501", shelf.root, targets_only=True)
    assert roles.labeled == () and len(roles.targets[0].query) == 2
    assert "CUHK-SYSU" in sentence("p3-market1501", shelf.root)


def test_counts_that_differ_are_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        resolve_protocol("table6-market-to-duke", root)
    assert any(message.startswith("The train split of Market-1501 differs from") for message in caplog.messages)
    assert not any("CUHK" in message for message in caplog.messages)


# What is missing


def test_all_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = sentence("table4", tmp_path / "empty")
    assert message.startswith(f"Protocol table4 lacks in {tmp_path / 'empty'}: CUHK02, which can be asked for at ")
    for name in ("cuhk02", "cuhk03", "cuhk_sysu", "market1501", "msmt17", "viper", "prid", "grid", "ilids"):
        assert KNOWN[name].title in message and KNOWN[name].origin in message
    assert "DukeMTMC-reID, which is no longer distributed (It was withdrawn in 2019" in message
    assert "CUHK03 (detected, new protocol)" in message
    short = sentence("p1", tmp_path / "empty", targets_only=True)
    assert "CUHK" not in short and "VIPeR" in short
    assert "There is no folder" in sentence("p1", tmp_path / "nowhere")


def test_what_is_there_but_of_no_use_is_said_with_its_place(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    shelf.cuhk03(["detected"])
    shelf.market()
    shelf.market("copies/market1501")
    (shelf.root / "cuhk_sysu/Image").mkdir(parents=True)
    (shelf.root / "cuhk_sysu/annotation").mkdir()
    (shelf.root / "cuhk_sysu/annotation/Person.mat").touch()
    shelf.cuhk02()
    shelf.draw("cuhk02/Dataset/P1/cam1", ["person.png"])
    shelf.small("viper")
    next((shelf.root / "VIPeR/cam_a").iterdir()).unlink()
    message = sentence("p1", shelf.root)
    home = shelf.root / "CUHK03-NP"
    assert f"CUHK03 (labeled, new protocol): {home} has 'detected, new protocol'" in message
    market = shelf.root / "Market-1501-v15.09.15"
    assert f"one Market-1501, as it lies at {market} and at {shelf.root / 'copies/market1501'}" in message
    assert "a readable CUHK-SYSU: " in message and "--extract" in message
    assert "a readable CUHK02: " in message and "person.png is not named like" in message
    assert f"images of VIPeR at {shelf.root / 'VIPeR'}: there are 631 people in both cameras, not 632" in message
    assert "PRID, which can be asked for" in message


# No person is both trained on and tested on


def test_a_target_person_among_the_train_images_is_refused(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    shelf.market()
    shelf.duke()
    assert resolve_protocol("table6-duke-to-market", shelf.root).unlabeled
    # Who is searched for, who is in the gallery only, and who is searched for in vain; a distractor is no person.
    for image, person in (("bounding_box_train/0006", 6), ("bounding_box_test/0007", 7), ("query/0002", 2),
                          ("bounding_box_train/0000", None)):  # fmt: skip
        name = f"Market-1501-v15.09.15/{image}_c4s1_000001_00.jpg"
        shelf.draw(".", [name])
        if person is None:
            assert resolve_protocol("table6-duke-to-market", shelf.root)
        else:
            assert sentence("table6-duke-to-market", shelf.root).startswith(
                "Protocol table6-duke-to-market would train on people of its target Market-1501: 1 of them, "
                f"person {person} the first"
            )
        (shelf.root / name).unlink()


def test_all_images_of_the_target_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(protocol_of("table6-duke-to-market"), name="wrong", images="all")
    monkeypatch.setattr(module, "PROTOCOLS", {"wrong": wrong})
    assert "2 of them, person 5 the first" in sentence("wrong", root)


# The list of them


def listed(**options: str | bool) -> str:
    with redirect_stdout(io.StringIO()) as said:
        list_protocols(**options)
    return said.getvalue()


def test_they_are_listed_with_what_a_folder_lacks(root: Path, tmp_path: Path) -> None:
    bare = listed()
    assert all(f"{name}: " in bare for name in PROTOCOLS) and "missing" not in bare.lower()
    assert "trained on all images of Market-1501, CUHK02, CUHK03 (labeled, new protocol), CUHK-SYSU\n" in bare
    assert listed(root=str(root)).count("missing    nothing\n") == len(PROTOCOLS)
    shelf = Shelf(tmp_path / "shelf")
    shelf.market()
    shelf.duke()
    some = listed(root=str(shelf.root))
    assert some.count("missing    nothing\n") == 4 and "missing    MSMT17 (V1, else V2)\n" in some
    assert f"Missing: VIPeR, which can be asked for at {KNOWN['viper'].origin}.\n" in some
    content = {each["name"]: each for each in json.loads(listed(root=str(shelf.root), json=True))}
    assert set(content) == set(PROTOCOLS) and content["table6-market-to-duke"]["missing"] == []
    assert content["table5-market-to-duke"]["missing"][0].startswith("MSMT17 (V1, else V2), which can be asked for")
    assert content["p1"]["labeled"][2] == {"dataset": "cuhk03", "variants": ["labeled, new protocol"]}
    assert "missing" not in json.loads(listed(json=True))[0]
