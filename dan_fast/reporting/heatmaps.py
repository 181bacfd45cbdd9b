"""Heat maps of the spatial attention over images, in the manner of Fig. 9."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from torch import Tensor

from dan_fast.core.preprocessing import IMAGENET, Preprocessing
from dan_fast.reporting.canvas import save_png, show_image, style

_COLOURMAP = "turbo"


def plot_attention(
    images: Tensor,
    spatial_attention: Tensor,
    map_size: tuple[int, int],
    out_png: str | Path,
    preprocessing: Preprocessing = IMAGENET,
) -> Path:
    """Draw each image beside itself under its spatial attention.

    The attention is scaled to each image's own range and enlarged to the image's size, so colours compare
    positions within one image, not images. Above each stands the range that its colours span: where that is
    tiny, the attention is flat, whatever the picture suggests.

    Args:
        images: (n, 3, H, W) floating, normalised as the network gets them.
        spatial_attention: (n, h*w) floating, row by row, as ``nl_cbam`` returns it.
        map_size: (h, w) of the feature map.
        out_png: file to write.
        preprocessing: by which the images are normalised: ``DAN.preprocessing``.

    Returns:
        The path of the file.

    Raises:
        ValueError: shapes that do not fit, no image, or attention that is not finite.

    Example:
        >>> import tempfile, torch
        >>> out = Path(tempfile.mkdtemp()) / "attention.png"
        >>> plot_attention(torch.zeros(2, 3, 32, 16), torch.rand(2, 8), (4, 2), out).name
        'attention.png'
    """
    plain, overlaid = attention_overlays(images, spatial_attention, map_size, preprocessing)
    count, (height, width) = len(plain), plain.shape[1:3]
    pairs = min(4, count)
    rows = math.ceil(count / pairs)
    cell = 0.85
    with style():
        figure = Figure(figsize=(cell * 2.3 * pairs + 0.9, cell * height / width * rows * 1.06 + 0.2))
        across, down = 1 / figure.get_figwidth(), 1 / figure.get_figheight()
        # A pair of images, then a gap.
        grid = figure.add_gridspec(
            rows,
            3 * pairs - 1,
            width_ratios=([1, 1, 0.25] * pairs)[:-1],
            left=0.1 * across,
            right=1 - 0.85 * across,
            top=1 - 0.2 * down,
            bottom=0.1 * down,
            wspace=0.04,
            hspace=0.1,
        )
        for place, attention in enumerate(spatial_attention):
            row, column = divmod(place, pairs)
            show_image(figure.add_subplot(grid[row, 3 * column]), plain[place])
            axes = figure.add_subplot(grid[row, 3 * column + 1])
            show_image(axes, overlaid[place])
            # What its colours span, since each image's span its own: the middle and how far it goes either way.
            low, high = float(attention.min()), float(attention.max())
            axes.set_title(f"{(low + high) / 2:.4f} ± {(high - low) / 2:.0e}", fontsize=6, loc="center", pad=2)
        _draw_scale(figure)
        return save_png(figure, out_png, dpi=150)


def attention_overlays(
    images: Tensor, spatial_attention: Tensor, map_size: tuple[int, int], preprocessing: Preprocessing = IMAGENET
) -> tuple[np.ndarray, np.ndarray]:
    """Images without and with the colours of `plot_attention`, two arrays (n, H, W, 3) uint8.

    Args, Raises: as `plot_attention`.

    Example:
        >>> plain, overlaid = attention_overlays(torch.zeros(2, 3, 32, 16), torch.rand(2, 8), (4, 2))
        >>> plain.shape, bool((plain == overlaid).all())
        ((2, 32, 16, 3), False)
    """
    originals, heat = _prepare(images, spatial_attention, map_size, preprocessing)
    overlaid = 0.5 * originals + 0.5 * matplotlib.colormaps[_COLOURMAP](heat)[..., :3]
    return (255 * originals + 0.5).astype(np.uint8), (255 * overlaid + 0.5).astype(np.uint8)


def _prepare(
    images: Tensor, spatial_attention: Tensor, map_size: tuple[int, int], preprocessing: Preprocessing
) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, H, W, 3) and heat (n, H, W), both in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}; it must be (n, 3, H, W) with n at least 1.")
    height, width = map_size
    if tuple(spatial_attention.shape) != (len(images), height * width):
        raise ValueError(
            f"spatial_attention has shape {tuple(spatial_attention.shape)}; "
            f"with map_size {height}x{width} it must be ({len(images)}, {height * width})."
        )
    # A_S often varies in its last digits only, which float32 would turn into stripes.
    heat = spatial_attention.detach().to("cpu", torch.float64).reshape(-1, 1, height, width)
    if not bool(torch.isfinite(heat).all()):
        raise ValueError("spatial_attention holds NaN or Inf; the network that made it has diverged.")
    heat = torch.nn.functional.interpolate(heat, images.shape[2:], mode="bicubic", align_corners=False)[:, 0]
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    heat = (heat - low) / (high - low).clamp(min=1e-12)
    pixels = images.detach().to("cpu", torch.float32) * torch.tensor(preprocessing.std).view(3, 1, 1)
    pixels = (pixels + torch.tensor(preprocessing.mean).view(3, 1, 1)).clamp(0, 1)
    return pixels.permute(0, 2, 3, 1).numpy(), heat.numpy()


def _draw_scale(figure: Figure) -> None:
    width, height = figure.get_figwidth(), figure.get_figheight()
    scale_height = min(1.6, height - 0.5)
    place = (1 - 0.7 / width, 0.5 - scale_height / height / 2, 0.12 / width, scale_height / height)
    bar = figure.colorbar(ScalarMappable(cmap=_COLOURMAP), cax=figure.add_axes(place), ticks=[0, 1])
    bar.ax.set_yticklabels(["least", "most"])
    bar.outline.set_visible(False)
