"""Which images of a run could not be decoded."""

from collections.abc import Callable, Iterable


class SkippedImages(set[str]):
    """Paths of images that cannot be decoded and were left out.

    Example:
        >>> skipped = SkippedImages(["a.jpg"])
        >>> skipped.tell(["a.jpg", "b.jpg"], print)
        Skipped b.jpg: it cannot be decoded.
        >>> sorted(skipped)
        ['a.jpg', 'b.jpg']
    """

    def tell(self, paths: Iterable[str], say: Callable[[str], None]) -> None:
        """Add these paths, and say those that are new."""
        for path in paths:
            if path not in self:
                self.add(path)
                say(f"Skipped {path}: it cannot be decoded.")
