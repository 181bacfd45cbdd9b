"""Identities of unlabelled images: clusters of their own, and pseudo labels that are confident."""

from collections.abc import Iterator
from itertools import islice
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from registry import HAD, change
from scipy import sparse
from sklearn.cluster import DBSCAN
from torch import Tensor

from dan_fast.core.errors import DanFastError
from dan_fast.data import BatchPlanner
from dan_fast.data.sampler import BatchPlan
from dan_fast.evaluation import extract_features
from dan_fast.evaluation.divided import Division
from dan_fast.evaluation.ranking import BLOCK_BYTES
from dan_fast.evaluation.reciprocal import Images, averaged, encodings, nearest
from dan_fast.evaluation.reranking import _jaccard
from dan_fast.nn import ProgressiveAugmentedMemory
from dan_fast.training import Trainer


def clustered(features: Tensor, k1: int = 30, k2: int = 6, eps: float = 0.5, least: int = 5) -> np.ndarray:
    """(n,) clusters, -1 for none: DBSCAN on Jaccard distances of k-reciprocal encodings of (n, d) features.

    k1, k2 and the four neighbours are those of Ge et al., "Self-paced Contrastive Learning with Hybrid Memory for
    Domain Adaptive Object Re-ID", NeurIPS 2020, without their criterion of reliability; clusters of fewer than five
    images are left out, as DomainMix does. Distances are divided by an image's largest first, as in re-ranking.
    """
    squares = features.double().square().sum(1).numpy()
    division = Division(None, [len(features) - 1])
    images = Images(features[:1], features[1:], (squares[:1], squares[1:]), "cosine", BLOCK_BYTES, division)
    found = nearest(images, k1 + 1)
    neighbours = images.gather(*(each.places.to(torch.int32).numpy() for each in found))
    largest = np.concatenate([each.largest.numpy() for each in found])
    rows = averaged(images, encodings(images, neighbours, largest, k1), neighbours, k2)
    columns, near = rows.tocsc(), []
    for place in range(len(features)):
        distances = _jaccard(rows, place, columns)
        near.append(np.flatnonzero(distances <= eps))
        near[-1] = np.stack([near[-1], distances[near[-1]].clip(1e-9)])
    begin = np.cumsum([0, *(each.shape[1] for each in near)])
    places, distances = np.concatenate(near, axis=1)
    graph = sparse.csr_array((distances, places.astype(np.int64), begin), shape=(len(features),) * 2)
    clusters = DBSCAN(eps=eps, min_samples=4, metric="precomputed").fit_predict(graph)
    sizes = np.bincount(clusters[clusters >= 0], minlength=max(1, clusters.max() + 1))
    return np.where((clusters >= 0) & (sizes[clusters] >= least), clusters, -1)


@change
def clusters_as_persons() -> Iterator[None]:
    """Clusters of the images of the last labelled set stand for its persons, anew at each epoch but the first.

    For DAML1 without adversary and unlabelled images. The set's own labels are not used. Its images are trained by
    loss.labeled_embedding alone; those in no cluster are left out, and all of them in the first epoch.
    """
    train_epoch, cross_entropy = Trainer._train_epoch, F.cross_entropy
    known: list[int] = []

    def with_clusters(self: Trainer, *arguments: Any) -> None:
        samples, labels = self.training_set.labeled_samples, self.training_set.labels
        if self.training_set.unlabeled_samples or self.config.model.adversary:
            raise DanFastError("Clusters as persons are for trainings without unlabelled images and adversary.")
        last = {sample.path for sample in self.datasets.labeled[-1].train}
        strange = torch.tensor([sample.path in last for sample in samples])
        known[:] = [int(labels[~strange].max()) + 1]
        clusters = np.full(int(strange.sum()), -1)
        if self.epoch > 0:
            own = [sample for sample, each in zip(samples, strange.tolist(), strict=True) if each]
            network = self.model.eval().network
            given = {"cache": self.batches.cache, "preprocessing": network.preprocessing, "device": self.device}
            features = extract_features(network.embed, own, network.image_size, **given).features
            clusters = clustered(features)
            HAD.add("clusters_as_persons")
            count = len(np.unique(clusters[clusters >= 0]))
            print(f"{count} clusters of {(clusters >= 0).sum()} of {len(clusters)} images", flush=True)
            state = self.model.memory.labeled
            gone = state.labels >= known[0]
            usage = state.usage.masked_fill(gone, 0)
            self.model.memory.labeled = state._replace(
                features=state.features.masked_fill(gone[:, None], 0),
                labels=state.labels.masked_fill(gone, -1),
                sample_ids=state.sample_ids.masked_fill(gone, -1),
                evaluation=state.evaluation.masked_fill(gone, 0),
                usage=usage,
                least_used=usage.argmin(),
            )
        persons = labels.clone()
        persons[strange] = torch.from_numpy(np.where(clusters >= 0, clusters + known[0], -1))
        chosen = (persons >= 0).nonzero().squeeze(1).tolist()
        planner, data = self.batches.planner, self.config.data
        own_planner = BatchPlanner(
            persons[chosen], 0, data.batch_size, split=False, seed=planner.seed, iterations=planner.iterations
        )

        def batches(epoch: int, feedback: None = None) -> Iterator[BatchPlan]:
            for plan in own_planner.batches(epoch):
                yield BatchPlan(tuple(item._replace(index=chosen[item.index]) for item in plan.meta_train), None)

        planner.batches = batches
        train_epoch(self, *arguments)

    def of_known_persons(logits: Tensor, labels: Tensor, *arguments: Any, **options: Any) -> Tensor:
        rows = labels < known[0]
        return cross_entropy(logits[rows, : known[0]], labels[rows], *arguments, **options)

    with patch.object(Trainer, "_train_epoch", with_clusters), patch.object(F, "cross_entropy", of_known_persons):
        yield


@change
def confident_feedback() -> Iterator[None]:
    """What M' feeds back is what M is sure of, each image once an epoch, and nothing in the first two epochs.

    M is sure where a slot of M' and the slot of M that it is most like are each other's nearest, that slot has the
    pseudo label still, and the best of other persons is 0.03 lower in cosine. For feedback_fraction above 0.
    """
    reliable_samples, batches = ProgressiveAugmentedMemory.reliable_samples, BatchPlanner.batches

    def confident(self: ProgressiveAugmentedMemory) -> tuple[Tensor, Tensor]:
        ids, pseudo_labels = reliable_samples(self)
        known, state = self.labeled, self.unlabeled
        slots = (state.labels >= 0).nonzero()[:, 0]
        if not len(slots) or not known.occupied.any():
            return ids[:0], pseudo_labels[:0]
        features = known.features[known.occupied], state.features[slots]
        of_known, of_state = (F.normalize(each.float(), dim=1) for each in features)
        cosines, labels = of_state @ of_known.T, known.labels[known.occupied]
        best = cosines.max(1)
        label = labels[best.indices]
        of_others = cosines.masked_fill(labels == label[:, None], -torch.inf).amax(1)
        mutual = cosines.argmax(0)[best.indices] == torch.arange(len(slots), device=slots.device)
        sure = mutual & (best.values - of_others >= 0.03)
        persons = dict(zip(state.sample_ids[slots[sure]].tolist(), label[sure].tolist(), strict=True))
        given = zip(ids.tolist(), pseudo_labels.tolist(), strict=True)
        chosen = [place for place, (image, person) in enumerate(given) if persons.get(image) == person]
        return ids[chosen], pseudo_labels[chosen]

    def once(self: BatchPlanner, epoch: int, feedback: tuple[Tensor, Tensor] | None = None) -> Iterator[BatchPlan]:
        if epoch < 2 or feedback is None or not len(feedback[0]):
            yield from batches(self, epoch)
            return
        HAD.add("confident_feedback")
        samples = len(feedback[0])
        # As often as all its places can be filled with images that have not been fed back yet.
        count = samples // max(1, min(self._feedback_places, samples))
        yield from islice(batches(self, epoch, feedback), count)
        yield from islice(batches(self, epoch), count, None)

    with (
        patch.object(ProgressiveAugmentedMemory, "reliable_samples", confident),
        patch.object(BatchPlanner, "batches", once),
    ):
        yield
