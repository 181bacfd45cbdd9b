"""Whether a dataset can be scored at all, which is known before any of its images is embedded."""

from dan_fast.core.errors import DanFastError
from dan_fast.data.samples import ReIDDataset
from dan_fast.evaluation.problem import AveragePrecision


def require_scorable(dataset: ReIDDataset, ap: AveragePrecision = "standard", rerank: bool = False) -> None:
    """Refuse a dataset of which :func:`dan_fast.evaluation.evaluate_dataset` would give no figures, whatever it embeds.

    Args:
        dataset: that is to be tested on.
        ap: how average precision is to be taken.
        rerank: whether lists are to be re-ranked.

    Raises:
        DanFastError: the dataset has neither a query and a gallery nor a test split, or not all the images that its
            fixed splits name; no person is seen by two cameras in them; or it is scored single-shot, which does not go
            with `ap` or `rerank`.
    """
    require_evaluation_images(dataset)
    require_defined(dataset.name, dataset.single_shot, ap, rerank)
    if not _has_match(dataset):
        raise no_match(dataset.name)


def require_evaluation_images(dataset: ReIDDataset) -> None:
    """Refuse a dataset whose images to test on are missing, of no person, of no camera or of both kinds of test."""
    if (dataset.query or dataset.gallery) and dataset.test:
        raise DanFastError(
            f"{dataset.name} ({dataset.root}) has test images, which are split at random, beside query or gallery "
            "images, which are not: name all of them query and gallery, or give these a manifest of their own."
        )
    if bool(dataset.query) != bool(dataset.gallery):
        missing = "gallery" if dataset.query else "query"
        raise DanFastError(
            f"{dataset.name} ({dataset.root}) has no {missing} images: add them or evaluate on another dataset."
        )
    if not dataset.query and not dataset.test:
        raise DanFastError(
            f"{dataset.name} ({dataset.root}) has neither query and gallery nor test images: "
            "name a dataset with a test split or leave it out of the targets."
        )
    tested = (*dataset.query, *dataset.gallery, *dataset.test)
    nameless = sum(sample.pid < 0 for sample in tested)
    if nameless:
        raise DanFastError(
            f"{nameless} images of {dataset.name} ({dataset.root}) that are tested on are of nobody known (pid below "
            "0), and would count as one person: leave them out, or give those that are only to distract the pid 0."
        )
    unknown = sum(sample.camid < 0 for sample in tested)
    if unknown:
        raise DanFastError(
            f"{unknown} images of {dataset.name} ({dataset.root}) that are tested on have no camera (camid below 0), "
            "by which matches of a query's own camera are left out: give their cameras numbers from 0."
        )
    if not dataset.query and dataset.splits is not None and dataset.splits.missing:
        raise DanFastError(
            f"{dataset.name} ({dataset.root}) cannot be scored on its fixed splits ({dataset.splits.label}): "
            f"{dataset.splits.missing}; complete the folder, results on other splits cannot be compared."
        )


def require_defined(name: str, single_shot: bool, ap: AveragePrecision, rerank: bool) -> None:
    """Refuse re-ranking and other APs than the standard one for galleries that are drawn anew many times."""
    if single_shot and rerank:
        raise DanFastError(
            f"{name} is scored single-shot, with a gallery drawn anew many times, which is not re-ranked; "
            "leave out rerank."
        )
    if single_shot and ap != "standard":
        raise DanFastError(f"{name} is scored single-shot, for which ap {ap} is not defined; leave it out.")


def no_match(name: str) -> DanFastError:
    """The error of a dataset without a match in another camera."""
    return DanFastError(
        f"{name} has no person seen by two cameras in its evaluation images, so none can be found again; "
        "check the identities and cameras (images of one camera can be query and gallery under different numbers)."
    )


def _has_match(dataset: ReIDDataset) -> bool:
    """Whether any person has a match in another camera."""
    # A split of test images has a match of each person with two cameras; identity 0 is that of distractors, which are
    # not searched for.
    if dataset.query:
        searched, found = dataset.query, dataset.gallery
    else:
        searched, found = [each for each in dataset.test if each.pid != 0], dataset.test
    cameras: dict[int, set[int]] = {}
    for sample in found:
        cameras.setdefault(sample.pid, set()).add(sample.camid)
    return any(cameras.get(sample.pid, set()) - {sample.camid} for sample in searched)
