"""Where a pedestrian is seen: cameras with their own background and light, views, and the finished image."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from dan_fast.data.synthetic.domains import Color, Domain, Occluder
from dan_fast.data.synthetic.person import FACINGS, Identity, Pose, draw_person, sample_identity

# Drawn larger and averaged down: Pillow's shapes have hard edges.
_OVERSAMPLE = 2
_PANORAMA = 3  # image widths


@dataclass(frozen=True)
class Camera:
    """One camera of a domain: viewpoint, light and colour response, the same for all of its images."""

    elevation: float
    """0 at body height, 0.3 far above; foreshortens the legs."""
    facing: int
    """Index into ``FACINGS`` of the side most people turn to it."""
    fill: float
    """Share of the image's height that a person of average height takes."""
    horizon: float
    gains: tuple[float, float, float]
    gamma: float
    slope: float
    """Light from the right minus light from the left, in log units across the image."""
    scenery_seed: int


@dataclass(frozen=True)
class View:
    """Everything that differs between two images of one person by one camera."""

    pose: Pose
    place: float
    """Where in the camera's background, 0 to 1."""
    exposure: float
    fill: float
    shift: tuple[float, float]
    """Offset of the body from the middle of the box, in box widths and heights."""
    misalignment: Literal["none", "position", "incomplete"]
    occluder: Occluder | None
    occluder_side: int
    occluder_size: float
    seed: int
    """Of the noise, the colour of a car and the identity of an occluding pedestrian."""


def sample_camera(domain: Domain, rng: np.random.Generator) -> Camera:
    """Draw a camera of a domain; ``domain.variation`` sets how far cameras differ in colour."""
    warm = 0.22 * domain.warmth
    tone = np.array([warm, 0.0, -warm]) + domain.variation * rng.standard_normal(3)
    level = np.log(domain.brightness) + 0.6 * domain.variation * rng.standard_normal()
    red, green, blue = (float(g) for g in np.exp(tone + level))
    return Camera(
        elevation=rng.uniform(0.0, 0.3),
        facing=int(rng.integers(len(FACINGS))),
        fill=rng.uniform(0.8, 0.92),
        horizon=rng.uniform(0.35, 0.6),
        gains=(red, green, blue),
        gamma=float(np.exp(0.8 * domain.variation * rng.standard_normal())),
        slope=rng.uniform(-0.6, 0.6),
        scenery_seed=int(rng.integers(2**32)),
    )


def sample_view(domain: Domain, camera: Camera, rng: np.random.Generator) -> View:
    """Draw a view; ``domain.misaligned`` and ``domain.occluded`` are the shares of those two mishaps."""
    facing = FACINGS[camera.facing if rng.random() < 0.4 else int(rng.integers(len(FACINGS)))]
    pose = Pose(facing, phase=rng.uniform(0.0, 2 * np.pi))
    fill = camera.fill * rng.uniform(0.96, 1.04)
    shift = rng.uniform(-0.04, 0.04, size=2)
    sign = rng.choice((-1.0, 1.0), size=2)
    place, exposure = rng.uniform(0.0, 1.0), float(np.exp(0.1 * rng.standard_normal()))
    misalignment = "none"
    if rng.random() < domain.misaligned:
        misalignment = "position" if rng.random() < 0.5 else "incomplete"
    if misalignment == "position":
        # A loose box off the body: the person is small and away from the middle.
        fill *= rng.uniform(0.7, 0.9)
        shift = sign * rng.uniform((0.12, 0.06), (0.28, 0.14))
    elif misalignment == "incomplete":
        # A tight box on the upper or lower part.
        fill *= rng.uniform(1.3, 1.7)
        shift = np.array((shift[0], sign[1] * 0.5 * (fill - 0.9)))
    occluder = None
    if rng.random() < domain.occluded:
        occluder = domain.occluders[int(rng.integers(len(domain.occluders)))]
    return View(
        pose=pose,
        place=place,
        exposure=exposure,
        fill=float(fill),
        shift=(float(shift[0]), float(shift[1])),
        misalignment=misalignment,
        occluder=occluder,
        occluder_side=int(rng.choice((-1, 1))),
        occluder_size=rng.uniform(0.0, 1.0),
        seed=int(rng.integers(2**32)),
    )


def scenery(domain: Domain, camera: Camera, image_size: tuple[int, int]) -> Image.Image:
    """Draw a camera's background, wider than an image and at drawing scale; ``render`` uses a part of it."""
    rng = np.random.default_rng(camera.scenery_seed)
    height, width = (_OVERSAMPLE * side for side in image_size)
    span, horizon = _PANORAMA * width, camera.horizon * height
    panorama = Image.new("RGB", (span, height), domain.ground)
    draw = ImageDraw.Draw(panorama)

    def tint(color: Color, spread: int = 18) -> Color:
        return tuple(int(c) for c in np.clip(np.add(color, rng.integers(-spread, spread + 1)), 0, 255))

    def wall() -> Color:
        return tint(domain.walls[int(rng.integers(len(domain.walls)))])

    # Paving: bands that narrow towards the horizon.
    for k in range(6):
        y = horizon + (height - horizon) * (k / 6) ** 1.6
        draw.rectangle((0, y, span, y + 0.02 * height * (1 + k)), fill=tint(domain.ground, 14))
    x = 0.0
    while x < span:
        step = width * rng.uniform(0.35, 0.8)
        draw.rectangle((x, 0, x + step, horizon), fill=wall())
        _structure(draw, domain, rng, (x, step), horizon, height, wall(), tint)
        x += step
    return panorama


def _structure(
    draw: ImageDraw.ImageDraw,
    domain: Domain,
    rng: np.random.Generator,
    columns: tuple[float, float],
    horizon: float,
    height: int,
    color: Color,
    tint: Callable[..., Color],
) -> None:
    """Draw one piece of the background; `columns` are its left edge and its width."""
    x, step = columns
    match domain.structure:
        case "trees":
            draw.rectangle((x + 0.45 * step, 0.2 * horizon, x + 0.57 * step, horizon), fill=tint((92, 68, 48)))
            for _ in range(5):
                cx, cy, r = (
                    x + step * rng.random(),
                    0.5 * horizon * rng.random(),
                    step * rng.uniform(0.2, 0.4),
                )
                draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=tint((70, 116, 58), 28))
        case "pillars":
            draw.rectangle((x, 0.75 * horizon, x + step, 0.8 * horizon), fill=tint((210, 190, 70)))
            draw.rectangle((x + 0.3 * step, 0, x + 0.55 * step, horizon * 1.1), fill=color)
            draw.line((x + 0.3 * step, 0, x + 0.3 * step, horizon * 1.1), fill=tint((60, 64, 72)), width=3)
        case "lamps":
            cx, cy, r = x + step * rng.random(), horizon * rng.uniform(0.1, 0.7), 0.04 * height
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=tint((250, 226, 160), 5))
            draw.rectangle((cx - 2, cy, cx + 2, horizon), fill=(34, 34, 38))
        case "shops":
            draw.rectangle((x + 0.08 * step, 0.3 * horizon, x + 0.92 * step, horizon), fill=color)
            draw.rectangle((x, 0.1 * horizon, x + step, 0.25 * horizon), fill=tint((170, 90, 90), 80))
            for _ in range(3):
                cx, cy = x + step * rng.uniform(0.15, 0.7), horizon * rng.uniform(0.35, 0.8)
                draw.rectangle((cx, cy, cx + 0.15 * step, cy + 0.12 * horizon), fill=tint((180, 160, 120), 70))
        case "buildings":
            for row in range(4):
                for column in range(2):
                    left, top = x + step * (0.15 + 0.45 * column), horizon * (0.06 + 0.24 * row)
                    draw.rectangle((left, top, left + 0.25 * step, top + 0.13 * horizon), fill=tint((70, 84, 100)))
        case "containers":
            draw.rectangle((x, 0.5 * horizon, x + step, horizon), fill=color)
            for k in range(1, 6):
                column = x + step * k / 6
                draw.line((column, 0.5 * horizon, column, horizon), fill=tuple(c * 3 // 4 for c in color), width=2)


def _occlude(image: Image.Image, view: View, ground: float, body: float) -> None:
    """Put the view's occluder in front; its sizes go with the body, whatever the shape of the box."""
    width, height = image.size
    rng = np.random.default_rng((view.seed, 1))
    draw, side, size = ImageDraw.Draw(image), view.occluder_side, view.occluder_size
    centre = width * (0.5 + view.shift[0])
    if view.occluder == "pole":
        x, half = centre + side * body * rng.uniform(0.02, 0.09), body * (0.025 + 0.03 * size)
        grey = int(rng.integers(50, 150))
        draw.rectangle((x - half, 0, x + half, height), fill=(grey, grey, grey + 6))
        draw.rectangle((x - half, 0, x - 0.5 * half, height), fill=(grey + 40, grey + 40, grey + 44))
    elif view.occluder == "car":
        paint = tuple(int(c) for c in rng.integers(40, 220, size=3))
        top, nose = ground - body * (0.25 + 0.2 * size), centre - side * body * 0.17
        tail = nose + side * 1.6 * body
        bonnet = [(nose, ground), (nose, top + 0.08 * body), (nose + side * 0.14 * body, top)]
        draw.polygon([*bonnet, (tail, top), (tail, ground)], fill=paint)
        draw.rectangle((0, ground, width, max(ground, height)), fill=(60, 60, 62))
        window = sorted((nose + side * 0.2 * body, tail))
        draw.rectangle((window[0], top + 0.03 * body, window[1], top + 0.1 * body), fill=(44, 52, 60))
        wheel, r = nose + side * 0.26 * body, 0.07 * body
        draw.ellipse((wheel - r, ground - r, wheel + r, ground + r), fill=(24, 24, 26))
    elif view.occluder == "person":
        pose = Pose(FACINGS[int(rng.integers(4))], rng.uniform(0.0, 2 * np.pi))
        x = centre + side * body * (0.25 - 0.12 * size)
        draw_person(image, sample_identity(rng), pose, x, ground - 0.92 * body, body * 1.05)


def render(
    domain: Domain,
    identity: Identity,
    camera: Camera,
    view: View,
    image_size: tuple[int, int] = (128, 64),
    background: Image.Image | None = None,
) -> Image.Image:
    """Make one image: the same arguments give the same pixels.

    Args:
        domain: Style of the image: quality and tone.
        identity: The person in it.
        camera: Which camera took it.
        view: What is particular to this image.
        image_size: Height and width in pixels.
        background: ``scenery(domain, camera, image_size)`` when it is at hand; drawn otherwise.

    Returns:
        RGB image of ``image_size``.
    """
    rows, columns = image_size
    height, width = _OVERSAMPLE * rows, _OVERSAMPLE * columns
    panorama = scenery(domain, camera, image_size) if background is None else background
    left = int(view.place * (panorama.width - width))
    image = panorama.crop((left, 0, left + width, height))
    body = height * view.fill * identity.height / 1.1
    x = width * (0.5 + view.shift[0])
    # All persons stand on the same ground: a shorter person's head is lower in the box.
    ground = height * (0.5 + view.shift[1] + 0.5 * view.fill)
    ImageDraw.Draw(image).ellipse(
        (x - 0.2 * body, ground - 0.025 * body, x + 0.2 * body, ground + 0.02 * body),
        fill=tuple(int(0.6 * c) for c in domain.ground),
    )
    draw_person(image, identity, view.pose, x, ground - body, body, camera.elevation)
    _occlude(image, view, ground, body)
    return _develop(image.reduce(_OVERSAMPLE), domain, camera, view)


def _develop(image: Image.Image, domain: Domain, camera: Camera, view: View) -> Image.Image:
    """Light, tone and quality: optics first, then sensor noise, then the colour response."""
    columns, rows = image.size
    image = image.filter(ImageFilter.GaussianBlur(domain.blur * rows / 128))
    if domain.resolution < 1:
        small = (max(1, round(columns * domain.resolution)), max(1, round(rows * domain.resolution)))
        image = image.resize(small, Image.Resampling.BILINEAR).resize((columns, rows), Image.Resampling.BILINEAR)
    table: list[int] = []
    for gain in camera.gains:
        for level in range(256):
            light = (gain * view.exposure * (level / 255) ** 1.6) ** (camera.gamma / 1.6)
            light = 0.5 + domain.contrast * (light - 0.5)
            light = (1 - domain.haze) * light + domain.haze * 0.72
            table.append(round(255 * min(1.0, max(0.0, light))))
    pixels = np.asarray(image.point(table), dtype=np.float32)
    slope = np.linspace(1 - camera.slope / 2, 1 + camera.slope / 2, columns, dtype=np.float32)
    noise = np.random.default_rng((view.seed, 0)).standard_normal(pixels.shape, dtype=np.float32)
    pixels = pixels * slope[None, :, None] + domain.noise * noise
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
