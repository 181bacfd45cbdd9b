"""Ranks of matches counted on parts of a gallery, against the whole on one rank."""

from contextlib import nullcontext

import pytest
import torch
from torch import distributed

from dan_fast import _extension
from dan_fast.evaluation import evaluate_ranking
from tests.support.ranks import Ranks


def same_figures(group: distributed.ProcessGroup, metric: str, with_kernels: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    for dtype, images, block_bytes in ((torch.float32, 150, 1 << 13), (torch.float64, 9, 1 << 26)):
        # Few different features: most distances are ties, within a part of the gallery and across parts.
        few = torch.randn(7, 12, generator=generator, dtype=dtype)
        query, gallery = (few[torch.randint(0, 7, (n,), generator=generator)] for n in (40, images))
        query[::3] += torch.randn(14, 12, generator=generator, dtype=dtype)
        ids, cams = ([torch.randint(0, of, (n,), generator=generator) for n in (40, images)] for of in (5, 3))
        sizes = [1, *[2] * (group.size() - 2), images - 2 * group.size() + 3]
        own = [x.split(sizes)[group.rank()] for x in (gallery, ids[1], cams[1])]
        with nullcontext() if with_kernels else _extension.disabled():
            settings = {"metric": metric, "max_rank": 10, "block_bytes": block_bytes}
            whole = evaluate_ranking(query, gallery, ids[0], ids[1], cams[0], cams[1], **settings)
            settings["process_group"] = group
            parts = evaluate_ranking(query, own[0], ids[0], own[1], cams[0], own[2], **settings)
            assert torch.equal(parts.cmc, whole.cmc) and parts[1:] == whole[1:] and 0 < whole.mAP < 1
            broken = own[0] * torch.nan if group.rank() == 1 else own[0]
            with pytest.raises(ValueError, match="gallery_features holds NaN" if group.rank() == 1 else "another rank"):
                evaluate_ranking(query, broken, ids[0], own[1], cams[0], own[2], **settings)


@pytest.mark.parametrize("with_kernels", [True, False], ids=["kernels", "form"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_figures_are_those_of_one_rank_to_the_last_bit(ranks: Ranks, metric: str, with_kernels: bool):
    ranks.run(same_figures, metric, with_kernels)
