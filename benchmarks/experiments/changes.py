"""Changes of the method that were tried and did not become settings, because no figure supports one.

docs/experiments.md has their figures.

    python benchmarks/experiments/changes.py uniform_slots --config benchmarks/experiments/base.yaml --recipe dan ...

trains as `dan-fast train` with these settings does, with the change, and fails where the settings left it without an
effect. Each is a context in which the package is changed; resuming, several ranks and meta.order 2 are not thought of.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from sklearn.cluster import DBSCAN
from torch import Tensor, nn

import dan_fast.nn.attention as attention_module
from dan_fast.cli import main
from dan_fast.core.errors import DanFastError
from dan_fast.core.types import AttentionHeadOutput, AttentionVariantWeights, NLCBAMWeights
from dan_fast.daml import Stage
from dan_fast.data import BatchPlanner, Split
from dan_fast.data.sampler import BatchPlan
from dan_fast.evaluation import extract_features
from dan_fast.evaluation.divided import Division
from dan_fast.evaluation.ranking import BLOCK_BYTES
from dan_fast.evaluation.reciprocal import Images, averaged, encodings, nearest
from dan_fast.evaluation.reranking import _jaccard
from dan_fast.functional.attention import attention_variant_head, variants
from dan_fast.functional.memory.passes import memory_scores
from dan_fast.nn import ProgressiveAugmentedMemory
from dan_fast.training import MetaStep, Trainer, TrainingModel
from dan_fast.training.batches import TrainingBatches
from dan_fast.training.metrics import accuracy
from dan_fast.training.objective import PassRecord, require_sound

Change = Callable[[], Any]
CHANGES: dict[str, Change] = {}
# The changes that have had an effect.
HAD: set[str] = set()


def change(function: Callable[[], Iterator[None]]) -> Change:
    """Make a generator function a context, known by its name."""
    CHANGES[function.__name__] = contextmanager(function)
    return CHANGES[function.__name__]


def _head_of_parts(features: Tensor, weights: NLCBAMWeights, cam_weight: Tensor, labels: Tensor) -> AttentionHeadOutput:
    """`attention_head` in PyTorch, from the functions of `variants`, which can be replaced."""
    return attention_variant_head(features, AttentionVariantWeights(**weights._asdict()), cam_weight, labels)


@contextmanager
def _with_part(name: str, part: Callable[..., Tensor]) -> Iterator[None]:
    """Another function in the place of a part of NL-CBAM's head."""
    with patch.object(attention_module, "attention_head", _head_of_parts), patch.object(variants, name, part):
        yield


def _units(g: Tensor, m: Tensor, weights: AttentionVariantWeights) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and C (B, P) of Eq. (3)."""
    of = ((g, weights.ws1, weights.ws2), (m, weights.ws1, weights.ws2), (g, weights.ws3, weights.ws4))
    a, b, c = (torch.sigmoid(F.linear(F.relu(F.linear(x, reduce)), expand)) for x, reduce, expand in of)
    return a, b, c


@change
def softmax_over_p() -> Iterator[None]:
    """Eq. (3) with the softmax of A_p B_q over p, so that the columns of S sum to 1 in the place of its rows.

    For NL-CBAM.
    """

    def spatial_attention(g: Tensor, m: Tensor, weights: AttentionVariantWeights) -> Tensor:
        HAD.add("softmax_over_p")
        a, b, c = _units(g, m, weights)
        return (torch.softmax(a.unsqueeze(2) * b.unsqueeze(1), dim=1) @ c.unsqueeze(2)).squeeze(2)

    with _with_part("spatial_attention_of", spatial_attention):
        yield


@change
def spatial_attention_is_c() -> Iterator[None]:
    """Eq. (3) with A_S = C, free at each position. For NL-CBAM."""

    def spatial_attention(g: Tensor, m: Tensor, weights: AttentionVariantWeights) -> Tensor:
        HAD.add("spatial_attention_is_c")
        return _units(g, m, weights)[2]

    with _with_part("spatial_attention_of", spatial_attention):
        yield


@change
def attention_as_residual() -> Iterator[None]:
    """The attention branch classifies attended + pooled. For NL-CBAM; recipe dan tests the pooled feature alone."""

    def head(*arguments: Tensor) -> AttentionHeadOutput:
        HAD.add("attention_as_residual")
        out = _head_of_parts(*arguments)
        return out._replace(attended=out.attended + out.pooled)

    with patch.object(attention_module, "attention_head", head):
        yield


@change
def adversary_factor_constant() -> Iterator[None]:
    """Eq. (4) with sigma(A_at + A_ad) as a weight without a gradient. For an adversary."""

    def loss(refined_map: Tensor, adversary_map: Tensor, labels: Tensor) -> Tensor:
        if (labels >= 0).any():
            HAD.add("adversary_factor_constant")
        factor = torch.sigmoid(refined_map + adversary_map).detach()
        return torch.where(labels >= 0, (factor * torch.sigmoid((refined_map - adversary_map).abs())).sum(1), 0)

    with _with_part("adversary_loss", loss):
        yield


@change
def adversary_maps_from_0_to_1() -> Iterator[None]:
    """Eq. (4) of both maps of an image scaled to [0, 1], as class activation maps usually are. For an adversary."""

    def scaled(maps: Tensor) -> Tensor:
        lowest, highest = torch.aminmax(maps, dim=1, keepdim=True)
        return (maps - lowest) / (highest - lowest).clamp(min=1e-12)

    def loss(refined_map: Tensor, adversary_map: Tensor, labels: Tensor) -> Tensor:
        if (labels >= 0).any():
            HAD.add("adversary_maps_from_0_to_1")
        refined, adversary = scaled(refined_map), scaled(adversary_map)
        summands = torch.sigmoid(refined + adversary) * torch.sigmoid((refined - adversary).abs())
        return torch.where(labels >= 0, summands.sum(1), 0)

    with _with_part("adversary_loss", loss):
        yield


@change
def running_accuracies() -> Iterator[None]:
    """The competition decides by accuracies averaged over iterations, 0.95 of what was and 0.05 of the new.

    For DAML3 with an adversary; attention wins a tie, and meta.tie decides nothing.
    """
    running: dict[str, float] = {}

    def compete(self: MetaStep, record: PassRecord) -> Stage:
        HAD.add("running_accuracies")
        require_sound(int(record.fault))
        for name, logits in (("attention", record.logits), ("adversary", record.adversary_logits)):
            new = float(accuracy(logits, record.labels))
            running[name] = 0.95 * running.get(name, new) + 0.05 * new
        return self.competition.decide(running["attention"] >= running["adversary"])

    with patch.object(MetaStep, "_compete", compete):
        yield


@change
def parted_by_camera() -> Iterator[None]:
    """S is the images of one half of a batch's cameras, drawn anew for each, and S~ those of the other half.

    For DAML2 without unlabelled images, of a source with two cameras or more. S~ may be the larger part.
    """
    init, batches = TrainingBatches.__init__, BatchPlanner.batches

    def init_with_cameras(self: TrainingBatches, config: Any, training_set: Any, *arguments: Any) -> None:
        init(self, config, training_set, *arguments)
        self.planner.cameras = [sample.camid for sample in training_set.labeled_samples]

    def parted(self: BatchPlanner, epoch: int, feedback: tuple[Tensor, Tensor] | None = None) -> Iterator[BatchPlan]:
        generator = self._generator("cameras", epoch)
        for plan in batches(self, epoch, feedback):
            HAD.add("parted_by_camera")
            items = (*plan.meta_train, *plan.meta_test)
            cameras = sorted({self.cameras[item.index] for item in items})
            order = torch.randperm(len(cameras), generator=generator).tolist()
            half = {cameras[index] for index in order[: len(cameras) // 2]}
            inside = [self.cameras[item.index] in half for item in items]
            first = tuple(item for item, each in zip(items, inside, strict=True) if each)
            second = tuple(item for item, each in zip(items, inside, strict=True) if not each)
            # Batch norm needs two images in each.
            yield BatchPlan(first, second) if min(len(first), len(second)) > 1 else plan

    with patch.object(TrainingBatches, "__init__", init_with_cameras), patch.object(BatchPlanner, "batches", parted):
        yield


@change
def keys_of_a_momentum_encoder() -> Iterator[None]:
    """What is written to M is made by a backbone whose parameters are 0.99 of what they were and 0.01 of the trained.

    For DAML1 with loss.labeled_embedding and without unlabelled images.
    """
    teachers: dict[int, nn.Module] = {}
    made: list[Tensor] = []
    maps, forward = TrainingModel.maps, ProgressiveAugmentedMemory.forward

    def maps_of_both(self: TrainingModel, split: Split) -> Tensor:
        student = self.network.backbone
        if id(student) not in teachers:
            teachers[id(student)] = copy.deepcopy(student).requires_grad_(False)
        teacher = teachers[id(student)]
        with torch.no_grad():
            torch._foreach_lerp_([*teacher.parameters()], [each.detach() for each in student.parameters()], 0.01)
            made[:] = [teacher(split.images).mean((2, 3))[:, : self.network.key_dim]]
        return maps(self, split)

    def written(self: ProgressiveAugmentedMemory, keys: Tensor, *arguments: Any, **options: Any) -> Any:
        HAD.add("keys_of_a_momentum_encoder")
        return forward(self, made[0][: len(keys)], *arguments, **options)

    with (
        patch.object(TrainingModel, "maps", maps_of_both),
        patch.object(ProgressiveAugmentedMemory, "forward", written),
    ):
        yield


@change
def uniform_slots() -> Iterator[None]:
    """Keys are driven away from the slots of other persons: + log mean exp(-2 |k - m|^2), both of length 1.

    The uniformity of Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and
    Uniformity on the Hypersphere", ICML 2020, over M; a summand of loss.labeled_embedding.
    """
    labeled_loss = ProgressiveAugmentedMemory.labeled_loss

    def with_uniformity(
        self: ProgressiveAugmentedMemory, keys: Tensor, labels: Tensor, temperature: float, sizes: Any = None
    ) -> Tensor:
        state = self.labeled
        others = (state.labels >= 0) & (state.labels != labels[:, None])
        terms = labeled_loss(self, keys, labels, temperature, sizes)
        if not others.any(1).all():
            return terms
        HAD.add("uniform_slots")
        scores, squares = memory_scores(keys, state.features)
        cosines = scores / (keys.norm(dim=1, keepdim=True) * squares.sqrt()).clamp(min=1e-12)
        energy = (4 * cosines - 4).masked_fill(~others, -100.0).logsumexp(1) - others.sum(1).log()
        return terms + energy

    with patch.object(ProgressiveAugmentedMemory, "labeled_loss", with_uniformity):
        yield


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


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in CHANGES:
        listed = "\n".join(f"  {name}: {made.__doc__.splitlines()[0]}" for name, made in CHANGES.items())
        sys.exit(f"usage: python {sys.argv[0]} CHANGE [settings of dan-fast train]\n{listed}")
    with CHANGES[sys.argv[1]]():
        code = main(["train", *sys.argv[2:]])
    if code == 0 and sys.argv[1] not in HAD:
        sys.exit(f"{sys.argv[1]} had no effect with these settings; its docstring says what it is for.")
    sys.exit(code)
