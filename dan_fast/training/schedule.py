"""The step sizes delta_1 and delta_2 over the epochs, Eq. (19)."""

import math

PAPER_EPOCHS = 500


def step_size(epochs_done: float, epochs: int, scale: float = 1.0) -> float:
    """delta_1 = delta_2 after `epochs_done` of `epochs` epochs, times `scale`.

    Fewer than 500 epochs stretch the schedule over them, so that each of its four pieces keeps its share;
    more than 500 stay at its last value. Eq. (19) takes whole epochs t, and so does this: at 500 epochs the
    step size is constant within an epoch, in a stretched schedule it moves in 500 steps over the run.

    Raises:
        ValueError: `epochs` is not positive or `epochs_done` is negative.

    Example:
        >>> step_size(100, epochs=500), step_size(2, epochs=10)
        (0.001, 0.001)
    """
    if epochs < 1 or epochs_done < 0:
        raise ValueError(f"epochs must be positive and epochs_done not negative, got {epochs} and {epochs_done}")
    # The small term keeps a whole epoch whole where the quotient is not exact.
    t = math.floor(epochs_done * max(1.0, PAPER_EPOCHS / epochs) + 1e-9)
    if t <= 50:
        base = 1e-4 * (t / 4 + 1)
    elif t <= 200:
        base = 1e-3
    elif t <= 350:
        base = 1e-4
    else:
        base = 1e-5
    return base * scale
