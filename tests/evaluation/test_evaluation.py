"""Features of image files, random splits and the figures of a whole dataset."""

import dataclasses
import json
import shutil
from functools import partial
from types import MethodType, SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from dan_fast.core.errors import DanFastError
from dan_fast.core.preprocessing import IMAGENET, Preprocessing
from dan_fast.data.datasets.load import all_images
from dan_fast.data.samples import FixedSplit, FixedSplits, ReIDDataset, Sample
from dan_fast.evaluation.dataset_features import extract_dataset, random_split
from dan_fast.evaluation.features import extract_features
from dan_fast.evaluation.ranking import evaluate_ranking
from dan_fast.evaluation.reranking import Reranking, evaluate_reranked
from dan_fast.evaluation.result import COLUMNS, Evaluation
from dan_fast.evaluation.scorable import require_scorable
from dan_fast.evaluation.scoring import evaluate_dataset, evaluate_features
from dan_fast.evaluation.single_shot import evaluate_single_shot
from tests.support.dataset_shelf import coloured_people, colours
from tests.support.figures import assert_means
from tests.support.refusals import refusal

SIZE = (8, 4)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return tuple(coloured_people(tmp_path_factory.mktemp("people"), 6, 3, 35, np.random.default_rng(0)))


def tiny(**parts):
    (first, *_) = next(iter(parts.values()))
    return ReIDDataset("tiny", first.path.parent, **parts)


@pytest.fixture
def fixed(people):
    """A query for each two gallery images."""
    return tiny(query=people[::3], gallery=tuple(sample for place, sample in enumerate(people) if place % 3))


def test_features_follow_the_samples(people):
    seen = []
    result = extract_features(colours, people, SIZE, batch_size=5, progress=lambda *done: seen.append(done))
    assert result.features.shape == (36, 3) and result.features.dtype == torch.float32
    assert not result.features.is_inference()
    assert result.pids.tolist() == [sample.pid for sample in people]
    assert result.camids.tolist() == [sample.camid for sample in people]
    assert result.paths == tuple(sample.path for sample in people)
    assert (seen[0], seen[-1]) == ((5, 36), (36, 36))
    alone = torch.cat([extract_features(colours, [sample], SIZE).features for sample in people[::7]])
    torch.testing.assert_close(result.features[::7], alone)
    chosen = result.select(torch.tensor([4, 0]))
    assert chosen.paths == (people[4].path, people[0].path)
    assert torch.equal(chosen.features, result.features[[4, 0]])


def test_the_fingerprint_is_of_names_labels_and_splits_and_not_of_the_place(people, fixed, tmp_path):
    def found(dataset):
        return evaluate_dataset(colours, dataset, SIZE).fingerprint

    first, *rest = fixed.gallery
    others = [
        dataclasses.replace(fixed, gallery=(first._replace(pid=rest[-1].pid), *rest)),
        dataclasses.replace(fixed, gallery=(first._replace(camid=first.camid + 7), *rest)),
        dataclasses.replace(fixed, gallery=tuple(rest)),
        tiny(test=people),
        tiny(test=people[1:]),
    ]
    assert len({found(fixed), *map(found, others)}) == 6
    shutil.copytree(fixed.root, tmp_path / "copy")
    moved = {
        split: tuple(sample._replace(path=tmp_path / "copy" / sample.path.name) for sample in getattr(fixed, split))
        for split in ("query", "gallery")
    }
    assert found(ReIDDataset("tiny", tmp_path / "copy", **moved)) == found(fixed)


def test_bfloat16_runs_under_autocast_and_no_gradient_is_recorded(people):
    layer, seen = torch.nn.Linear(3, 2), []

    def half(images):
        seen.append(layer(colours(images)))
        return seen[-1]

    result = extract_features(half, people[:3], SIZE, precision="bfloat16")
    assert seen[0].dtype == torch.bfloat16
    assert result.features.dtype == torch.float32
    usual = extract_features(half, people[:3], SIZE)
    assert seen[1].dtype == torch.float32
    assert not result.features.requires_grad and not usual.features.requires_grad


def test_a_network_brings_its_preprocessing_and_has_to_be_in_evaluation_mode(people):
    class Network(torch.nn.Module):
        preprocessing = Preprocessing(mean=(0.0, 0.1, 0.2), std=(0.5, 0.5, 1.0), interpolation="bicubic")

        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(3)

        def forward(self, images):
            return colours(images)

        def embed(self, images):
            return self(images)

    network = Network().eval()
    expected = extract_features(colours, people[:3], SIZE, preprocessing=network.preprocessing).features
    usual = extract_features(colours, people[:3], SIZE).features
    wrapped, compiled = torch.nn.Sequential(network).eval(), torch.compile(network.embed, backend="eager")
    for embed in (network, network.embed, partial(network.embed), compiled, wrapped, partial(wrapped)):
        assert torch.equal(extract_features(embed, people[:3], SIZE).features, expected)
        assert torch.equal(extract_features(embed, people[:3], SIZE, preprocessing=IMAGENET).features, usual)
        network.train()
        sentence = r"a (Network|Sequential whose 0.norm is) in training mode, .* on the batch; call its eval\(\)"
        with pytest.raises(ValueError, match=sentence):
            extract_features(embed, people[:3], SIZE)
        network.eval()
    pool = torch.nn.Identity()
    pool.p = torch.nn.Parameter(torch.ones(2))
    wrapped.append(pool)  # in training mode, which says nothing
    assert torch.equal(extract_features(wrapped, people[:3], SIZE).features, expected)
    plain = SimpleNamespace(preprocessing=network.preprocessing)
    plain.embed = MethodType(lambda self, images: colours(images), plain)
    assert torch.equal(extract_features(plain.embed, people[:3], SIZE).features, expected)
    network.preprocessing = "of its own kind"
    assert torch.equal(extract_features(network, people[:3], SIZE).features, usual)


@pytest.mark.parametrize("reranking", [None, Reranking(4, 2, 0.3)])
def test_a_default_device_of_the_process_changes_no_figure(people, reranking):
    expected = evaluate_dataset(colours, tiny(test=people), SIZE, reranking=reranking)
    with torch.device("meta"):  # as a GPU would be
        assert evaluate_dataset(colours, tiny(test=people), SIZE, reranking=reranking) == expected


def test_broken_images_are_named_or_left_out(people, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    samples = [people[0], Sample(broken, 9, 1), Sample(broken, 9, 1), people[20]]
    assert str(broken) in refusal(extract_features, colours, samples, SIZE)
    result = extract_features(colours, samples, SIZE, batch_size=1, broken_images="skip")
    assert result.pids.tolist() == [people[0].pid, people[20].pid]
    assert result.paths == (people[0].path, people[20].path)
    said = refusal(extract_features, colours, samples[1:3], SIZE, broken_images="skip")
    assert said.startswith("None of the 2 images can be read")


def test_extraction_errors(people):
    assert "no images to embed" in refusal(extract_features, colours, [], SIZE)
    with pytest.raises(ValueError, match=r"embed made \(2, 3, 8, 4\) of 2 images"):
        extract_features(lambda images: images, people[:2], SIZE)
    for made, name in (((1, 2), "tuple"), (np.ones((2, 3)), "ndarray")):
        with pytest.raises(ValueError, match=f"embed made a {name}; it must make a .* as the embed method of a DAN"):
            extract_features(lambda images, made=made: made, people[:2], SIZE)
    with pytest.raises(ValueError, match="precision is 'half'"):
        extract_features(colours, people[:2], SIZE, precision="half")


def test_a_layer_that_drops_something_is_not_in_training_mode(people):
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Dropout(0.5))
    with pytest.raises(ValueError, match="embed is of a Sequential .* training mode"):
        extract_features(network, people[:2], SIZE)
    network.eval()[2].train()
    with pytest.raises(ValueError, match="whose 2 is in training mode"):
        extract_features(network, people[:2], SIZE)


def test_random_split_draws_one_image_of_each_pair():
    rng = np.random.default_rng(1)
    # Three images at least of everyone in every camera, in no order.
    pairs = np.array([(pid, camid) for pid in range(1, 10) for camid in range(3) for _ in range(3)])
    pids, camids = torch.from_numpy(pairs[rng.permutation(len(pairs))]).unbind(1)
    query, gallery = random_split(pids, camids, seed=4)
    assert sorted(zip(pids[query].tolist(), camids[query].tolist(), strict=True)) == [
        (pid, camid) for pid in range(1, 10) for camid in range(3)
    ]
    assert sorted([*query.tolist(), *gallery.tolist()]) == list(range(len(pids)))
    assert torch.equal(query, random_split(pids, camids, seed=4)[0])
    assert torch.equal(random_split(pids, camids)[0], random_split(pids, camids, seed=0, repeat=0)[0])
    others = [random_split(pids, camids, seed=5)[0], random_split(pids, camids, seed=4, repeat=1)[0]]
    assert not any(torch.equal(query, other) for other in others)
    assert not torch.equal(*others)
    # Every image gets its turn.
    drawn = torch.cat([random_split(pids, camids, repeat=repeat)[0] for repeat in range(40)])
    assert drawn.unique().numel() == len(pids)


@pytest.mark.parametrize("pid", [0, -1], ids=["distractors", "nobody known"])
def test_who_is_no_person_is_searched_in_and_not_for(pid):
    pids, camids = torch.tensor([1, pid, 1, 2, pid, 2, pid, pid]), torch.tensor([1, 1, 2, 1, 2, 2, 1, 2])
    query, gallery = random_split(pids, camids)
    assert sorted(pids[query].tolist()) == [1, 2]
    assert (pids[gallery] == pid).sum() == 4 and len(query) + len(gallery) == len(pids)


def test_random_split_leaves_someone_to_find():
    # As in VIPeR: one image of each person in each of two cameras. Person 51 has a single image.
    pids = torch.tensor([pid for pid in range(1, 51) for _ in range(2)] + [51])
    camids = torch.tensor([0, 1] * 50 + [0])
    query, gallery = random_split(pids, camids, seed=2)
    assert sorted(pids[query].tolist()) == list(range(1, 51))
    assert sorted(pids[gallery].tolist()) == list(range(1, 52))
    assert 10 < int(camids[query].sum()) < 40


def ranked(query, gallery):
    labels = query.pids, gallery.pids, query.camids, gallery.camids
    return evaluate_ranking(query.features, gallery.features, *labels)


def test_fixed_split_is_scored_once(fixed):
    result = evaluate_dataset(colours, fixed, SIZE)
    expected = ranked(*(extract_features(colours, part, SIZE) for part in (fixed.query, fixed.gallery)))
    assert result.cmc == tuple(expected.cmc.tolist())
    assert (result.mAP, result.mINP, result.num_valid) == expected[1:]
    assert (result.repeats, result.num_query, result.num_gallery) == (1, 12, 24)
    assert result.mAP_std is None
    assert result.row()[COLUMNS.index("mAP")] == f"{100 * expected.mAP:.1f}"
    assert result.protocol == "fixed query and gallery"


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_figures_are_those_of_what_was_asked_for(fixed, metric):
    features = extract_dataset(colours, fixed, SIZE)
    query, gallery = features.query, features.gallery
    given = query.features, gallery.features, query.pids, gallery.pids, query.camids, gallery.camids
    settings, reranking = {"metric": metric, "max_rank": 7, "ap": "trapezoid"}, Reranking(3, 2, 0.1)
    reranked = evaluate_features(features, **settings, reranking=reranking)
    assert reranked.protocol == "fixed query and gallery; k-reciprocal re-ranking (k1 3, k2 2, lambda 0.1)"
    figures = [
        (evaluate_features(features, **settings), evaluate_ranking(*given, **settings)),
        (reranked, evaluate_reranked(*given, **settings, reranking=reranking)),
    ]
    del settings["ap"]
    single = evaluate_features(features._replace(single_shot=True), seed=3, **settings)
    figures.append((single, evaluate_single_shot(*given, seed=3, **settings)))
    for found, expected in figures:
        assert found.cmc == tuple(expected.cmc.tolist())
        assert (found.mAP, found.mINP, found.num_valid) == expected[1:]
    assert len({found.mAP for found, _ in figures}) == 3
    said = refusal(evaluate_features, features._replace(single_shot=True), reranking=reranking)
    assert said.startswith("tiny is scored single-shot, ") and said.endswith("leave out rerank.")


def test_queries_without_a_match_are_said(fixed):
    person = fixed.query[0].pid
    alone = [each for each in fixed.query if each.pid == person]
    gone = dataclasses.replace(fixed, gallery=tuple(each for each in fixed.gallery if each.pid != person))
    result = evaluate_dataset(colours, gone, SIZE)
    assert result.conditions == f"fixed query and gallery; {len(alone)} queries without a match left out"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_queries_without_a_match_are_counted_in_each_split(people, order):
    first, *others = people
    found = [each for each in others if each.pid == first.pid and each.camid != first.camid]
    stranger = next(each for each in others if each.pid != first.pid)
    splits = [FixedSplit((), (first,), tuple(found)), FixedSplit((), (first, stranger), tuple(found))]
    named = FixedSplits("two", "0123456789", tuple(splits[each] for each in order))
    result = evaluate_dataset(colours, tiny(test=(first, stranger, *found), splits=named), SIZE)
    assert result.mAP_std is not None and len(result.cmc_std) == len(result.cmc), "two splits have a deviation"
    assert result.unmatched == 1 and "; 1 queries without a match left out in all splits together" in result.conditions


def test_an_image_that_is_query_and_gallery_is_left_out_once(people, tmp_path):
    broken = Sample(tmp_path / "broken.jpg", people[0].pid, 7)
    broken.path.write_text("no image")
    both = (*people, broken)
    result = evaluate_dataset(colours, tiny(query=both, gallery=both), SIZE, broken_images="skip")
    assert result.skipped == (str(broken.path),) and "1 broken images left out" in result.conditions


def test_random_splits_are_averaged(people):
    dataset, counted = tiny(test=people), Mock(side_effect=colours)
    result = evaluate_dataset(counted, dataset, SIZE, repeats=4, seed=3)
    assert sum(len(call.args[0]) for call in counted.call_args_list) == len(people)
    features = extract_features(colours, people, SIZE)
    splits = [random_split(features.pids, features.camids, 3, repeat) for repeat in range(4)]
    each = [ranked(*map(features.select, split)) for split in splits]
    assert_means(result, each)
    percent = result.percentages()
    assert percent["R5"] == pytest.approx(100 * result.cmc[4])
    assert percent["R10"] == pytest.approx(100 * result.cmc[9])
    deviations = (*(result.cmc_std[rank - 1] for rank in (1, 5, 10)), result.mAP_std, result.mINP_std)
    of_columns = zip(percent.values(), deviations, strict=True)
    assert result.row() == tuple(f"{mean:.1f} ± {100 * deviation:.1f}" for mean, deviation in of_columns)
    assert result.protocol == "one query per identity and camera, 4 random splits, seed 3"
    assert (result.num_query, result.num_gallery, result.num_valid) == (12, 24, 12)
    again = evaluate_dataset(colours, dataset, SIZE, repeats=4, seed=3)
    assert json.loads(json.dumps(again.to_dict())) == result.to_dict()
    assert evaluate_dataset(colours, dataset, SIZE, repeats=4, seed=8).mAP != result.mAP
    short = evaluate_dataset(colours, dataset, SIZE, repeats=1, max_rank=5).percentages()
    assert short["R5"] > 0 and np.isnan(short["R10"]), "a short curve has no rank 10"


def test_figures_say_how_they_were_scored_where_it_is_not_as_usual(fixed):
    usual = evaluate_dataset(colours, fixed, SIZE)
    assert (usual.metric, usual.ap, usual.precision, usual.rounding) == ("cosine", "standard", "float32", "")
    assert (usual.conditions, usual.scoring) == ("fixed query and gallery", "")
    other = evaluate_dataset(colours, fixed, SIZE, metric="euclidean", ap="trapezoid", precision="bfloat16")
    assert other.scoring == "euclidean distance; trapezoid AP; bfloat16"
    assert other.conditions == f"fixed query and gallery; {other.scoring}"
    assert Evaluation.from_dict(json.loads(json.dumps(other.to_dict()))) == other
    for metric, ap, words in (("euclidean", "standard", "euclidean distance"), ("cosine", "trapezoid", "trapezoid AP")):
        assert evaluate_dataset(colours, fixed, SIZE, metric=metric, ap=ap).conditions.endswith(f"; {words}")
    # Features of unknown precision, and figures of versions that did not record any of it.
    features = extract_dataset(colours, fixed, SIZE)._replace(precision="")
    assert (evaluate_features(features).precision, evaluate_features(features).scoring) == ("", "")
    old = usual.to_dict()
    for name in ("metric", "ap", "precision", "rounding", "seen"):
        del old[name]
    assert Evaluation.from_dict(old).conditions == usual.conditions
    for wrong in ("0.5", None, [0.5]):
        with pytest.raises((TypeError, ValueError)):
            Evaluation.from_dict(usual.to_dict() | {"mAP": wrong})
    # Of which set they are, and what its cameras were, is beside the figures.
    assert dataclasses.replace(usual, known_cameras=True, fingerprint="") == usual


def test_figures_say_what_the_device_made_of_float32(people):
    dataset = tiny(test=people)
    torch.set_float32_matmul_precision("medium")
    try:
        rounded = evaluate_dataset(colours, dataset, SIZE, repeats=1)
        half = evaluate_dataset(colours, dataset, SIZE, repeats=1, precision="bfloat16")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert rounded.conditions.endswith("; bfloat16 in matrix products")
    assert half.rounding == "" and half.conditions.endswith("; bfloat16")


def test_datasets_that_cannot_be_scored(people):
    lone = tuple(sample for sample in people if sample.camid == 1)
    for dataset, sentence in (
        (tiny(train=people), "neither query and gallery nor test images: name a dataset"),
        (tiny(query=people), "no gallery images"),
        (tiny(gallery=people), "no query images"),
        (tiny(test=lone), "no person seen by two cameras"),
        (tiny(query=people, test=people), "test images, which are split at random, beside query or gallery images"),
        (tiny(query=people, gallery=people, test=people), "test images, which are split at random, beside"),
        (tiny(test=people[:1]), "no person seen by two cameras"),
        (tiny(query=lone, gallery=lone), "no person seen by two cameras.*can be query and gallery under"),
        (tiny(test=tuple(sample._replace(pid=0) for sample in people)), "no person seen by two cameras"),
    ):
        for refuse in (require_scorable, lambda dataset: evaluate_dataset(colours, dataset, SIZE)):
            with pytest.raises(DanFastError, match=rf"tiny (\(.+\) )?has {sentence}"):
                refuse(dataset)
    require_scorable(tiny(query=lone, gallery=people[::-1]))
    with pytest.raises(DanFastError, match="network's features are not finite numbers: its training has diverged"):
        evaluate_dataset(lambda images: colours(images) * np.nan, tiny(test=people), SIZE)


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"repeats": 0}, ValueError, "repeats is 0"),
        ({"metric": "euclid"}, ValueError, "metric is 'euclid'"),
        ({"max_rank": 0}, ValueError, "max_rank is 0"),
        ({"ap": "trapez"}, ValueError, "ap is 'trapez'"),
        ({"reranking": True}, TypeError, r"reranking must be Reranking\(k1, k2, weight\), got True"),
        ({"reranking": Reranking(0, 6, 0.3)}, ValueError, "k1 is 0"),
    ],
)
def test_wrong_arguments_are_named_before_an_image_is_read(people, arguments, kind, sentence):
    embed = Mock()
    with pytest.raises(kind, match=sentence):
        evaluate_dataset(embed, tiny(test=people), SIZE, **arguments)
    assert not embed.called


@pytest.mark.parametrize("part", ["test", "gallery", "query"])
def test_images_of_nobody_known_are_refused(people, part):
    nameless = tuple(sample._replace(pid=-1) for sample in people)
    parts = {"test": nameless} if part == "test" else {"query": people, "gallery": people, part: people + nameless}
    sentence = rf"^{len(people)} images of tiny \(.+\) that are tested on are of nobody known \(pid below 0\)"
    with pytest.raises(DanFastError, match=sentence):
        evaluate_dataset(colours, tiny(**parts), SIZE)
    # Nor those without the camera by which matches of a query's own are left out.
    parts = dict.fromkeys(parts, people) | {part: tuple(sample._replace(camid=-1) for sample in people)}
    said = refusal(evaluate_dataset, colours, tiny(**parts), SIZE)
    assert said.startswith(f"{len(people)} images of tiny ") and "have no camera (camid below 0)" in said


def test_a_single_shot_dataset(people):
    classic = dataclasses.replace(tiny(query=people, gallery=people), variant="classic", single_shot=True)
    counted = Mock(side_effect=colours)
    result = evaluate_dataset(counted, classic, SIZE, seed=3, metric="euclidean", max_rank=6)
    # Query and gallery are the same images.
    assert sum(len(call.args[0]) for call in counted.call_args_list) == len(people)
    features = extract_features(colours, people, SIZE)
    labels = (features.pids, features.pids, features.camids, features.camids)
    expected = evaluate_single_shot(features.features, features.features, *labels, "euclidean", 6, 100, 3)
    assert (result.cmc, result.mAP, result.num_valid) == (tuple(expected.cmc.tolist()), expected.mAP, 36)
    assert result.protocol == "single shot: one gallery image of each person, drawn 100 times, seed 3"
    assert result.title == "tiny (classic)"
    plain = evaluate_dataset(colours, dataclasses.replace(classic, single_shot=False), SIZE, metric="euclidean")
    assert plain.mAP != pytest.approx(result.mAP, abs=1e-3)
    undefined = "tiny is scored single-shot, for which ap trapezoid is not defined; leave it out."
    assert refusal(evaluate_dataset, colours, classic, SIZE, ap="trapezoid") == undefined
    require_scorable(classic)
    assert refusal(require_scorable, classic, ap="trapezoid") == undefined
    said = refusal(require_scorable, classic, rerank=True)
    assert said.startswith("tiny is scored single-shot, ") and "not re-ranked" in said
    lone = tuple(sample for sample in people if sample.camid == 1)
    alone = dataclasses.replace(classic, query=lone, gallery=lone)
    assert "tiny has no person seen by two cameras" in refusal(evaluate_dataset, colours, alone, SIZE)
    assert (all_images(classic).train, all_images(classic).single_shot) == (people, False)
