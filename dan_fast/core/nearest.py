"""What a mistyped name may have meant."""

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """One or two of the names, the likeliest first: those that end like `name` after a dot, else those spelt alike.

    None where nothing is alike.

    Example:
        >>> settings = ("optimizer.lr_scale", "optimizer.backbone_lr_scale", "model.backbone")
        >>> nearest("optim.lr_scale", settings), nearest("optimizr.lr_scal", settings)[0], nearest("x", settings)
        (['optimizer.lr_scale'], 'optimizer.lr_scale', [])
    """
    names = list(names)
    last = name.rpartition(".")[2]
    same = [each for each in names if each.rpartition(".")[2] == last]
    return same[:2] or difflib.get_close_matches(name, names, 2)
