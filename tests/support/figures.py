"""Figures on a target as results.json has them."""


def evaluation(dataset: str, rank1: float, mean_precision: float, repeats: int = 1) -> dict:
    """Of `Evaluation`; fractions, with a spread where there are several `repeats`."""
    spread = 0.01 if repeats > 1 else None
    return {
        **{"dataset": dataset, "protocol": f"{repeats} random splits" if repeats > 1 else "fixed query and gallery"},
        **{"cmc": [rank1, *[rank1 + 0.05] * 9], "mAP": mean_precision, "mINP": 0.05, "repeats": repeats},
        **{"cmc_std": spread and [spread] * 10, "mAP_std": spread, "mINP_std": spread, "skipped": []},
        **{"num_query": 30, "num_gallery": 40, "num_valid": 30},
    }
