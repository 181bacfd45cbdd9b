"""A pedestrian: the traits that make an identity, and drawing one in a pose."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from dan_fast.data.synthetic.domains import Color

Facing = Literal["front", "right", "back", "left"]
FACINGS: tuple[Facing, ...] = ("front", "right", "back", "left")

# Few colours a garment: many people share them, so that people differ by pattern, build and bags.
_UPPER = ((28, 28, 32), (228, 228, 224), (176, 44, 44), (48, 76, 150), (128, 130, 134), (196, 164, 60))
_LOWER = ((32, 32, 36), (52, 66, 104), (116, 116, 118), (186, 168, 134))
_BAG = ((36, 34, 34), (160, 40, 48), (122, 84, 50), (50, 110, 120))
_SHOES = ((34, 32, 32), (222, 222, 220), (150, 92, 58))
_SKIN = ((236, 196, 168), (206, 158, 122), (150, 104, 76), (96, 66, 52))
_HAIR = ((28, 24, 24), (88, 58, 38), (196, 160, 98), (140, 138, 136))
_TRIM = (235, 235, 230)
_PATTERNS = ("plain", "hoops", "stripes", "checks", "logo", "yoke")


@dataclass(frozen=True)
class Identity:
    """What stays with a person from image to image. Lengths are shares of the body height."""

    height: float
    """Relative to an average person, about 0.85 to 1.1."""
    width: float
    leg: float
    skin: Color
    hair: Color
    long_hair: bool
    hat: Color | None
    upper: Color
    accent: Color
    pattern: str
    period: float
    long_sleeves: bool
    coat: float
    """How far the upper garment falls below the hip."""
    lower: Color
    lower_kind: Literal["trousers", "shorts", "skirt"]
    lower_pattern: Literal["plain", "seam", "bands"]
    bag: Literal["none", "backpack", "handbag", "satchel"]
    bag_color: Color
    shoes: Color


@dataclass(frozen=True)
class Pose:
    """How a person stands in one image: where they face and the walking phase in radians."""

    facing: Facing
    phase: float

    @property
    def side(self) -> int:
        """Where to: 1 to the right, -1 to the left, 0 to the camera or away from it."""
        return {"right": 1, "left": -1}.get(self.facing, 0)


def sample_identity(rng: np.random.Generator) -> Identity:
    """Draw the traits of one person.

    Example:
        >>> sample_identity(np.random.default_rng(0)) == sample_identity(np.random.default_rng(0))
        True
    """

    def pick(options: Sequence, weights: Sequence[float] | None = None):
        return options[int(rng.choice(len(options), p=weights))]

    def dyed(palette: Sequence[Color]) -> Color:
        return tuple(int(np.clip(c + rng.integers(-10, 11), 0, 255)) for c in pick(palette))

    upper = dyed(_UPPER)
    # An accent that could not be seen against the garment would make every pattern plain.
    accents = [color for color in _UPPER if abs(sum(color) - sum(upper)) > 150]
    return Identity(
        height=rng.uniform(0.85, 1.1),
        width=rng.uniform(0.75, 1.3),
        leg=rng.uniform(0.43, 0.54),
        skin=pick(_SKIN),
        hair=pick(_HAIR),
        long_hair=bool(rng.random() < 0.45),
        hat=dyed(_BAG) if rng.random() < 0.2 else None,
        upper=upper,
        accent=pick(accents),
        pattern=pick(_PATTERNS),
        period=rng.uniform(0.05, 0.1),
        long_sleeves=bool(rng.random() < 0.55),
        coat=pick((0.0, 0.03, 0.13), (0.45, 0.35, 0.2)),
        lower=dyed(_LOWER),
        lower_kind=pick(("trousers", "shorts", "skirt"), (0.5, 0.27, 0.23)),
        lower_pattern=pick(("plain", "seam", "bands"), (0.5, 0.25, 0.25)),
        bag=pick(("none", "backpack", "handbag", "satchel"), (0.25, 0.3, 0.25, 0.2)),
        bag_color=dyed(_BAG),
        shoes=pick(_SHOES),
    )


def _shade(color: Color, factor: float) -> Color:
    return tuple(int(c * factor) for c in color)


class _Pen:
    """Draws in body units: 1 is the body height, y = 1 the feet, x = 0 the middle.

    ``elevation`` is the camera's: from above, the head side looks larger and the legs shorter.
    """

    def __init__(self, image: Image.Image, x: float, top: float, height: float, elevation: float) -> None:
        self.image, self.draw = image, ImageDraw.Draw(image)
        self.x, self.top, self.height, self.elevation = x, top, height, elevation

    def at(self, x: float, y: float) -> tuple[float, float]:
        e = self.elevation
        return self.x + self.height * x * (1 + e * (0.5 - y)), self.top + self.height * (y + e * y * (1 - y))

    def polygon(self, points: Sequence[tuple[float, float]], color: Color) -> None:
        self.draw.polygon([self.at(x, y) for x, y in points], fill=color)

    def box(self, x: float, top: float, half: float, bottom: float, color: Color) -> None:
        self.polygon([(x - half, top), (x + half, top), (x + half, bottom), (x - half, bottom)], color)

    def oval(self, x: float, y: float, rx: float, ry: float, color: Color) -> None:
        (left, top), (right, bottom) = self.at(x - rx, y - ry), self.at(x + rx, y + ry)
        self.draw.ellipse((left, top, right, bottom), fill=color)

    def limb(self, points: Sequence[tuple[float, float]], width: float, color: Color) -> None:
        pixels = [self.at(x, y) for x, y in points]
        self.draw.line(pixels, fill=color, width=max(1, round(width * self.height)), joint="curve")
        self.oval(*points[-1], width / 2, width / 2, color)

    def fabric(self, outline: Sequence[tuple[float, float]], color: Color, accent: Color, pattern: str,
               period: float) -> None:  # fmt: skip
        """Fill an outline (its first point is top left) with a pattern that moves with the body."""
        if pattern == "plain":
            return self.polygon(outline, color)
        pixels = [self.at(x, y) for x, y in outline]
        left, top = (int(min(p[i] for p in pixels)) for i in (0, 1))
        right, bottom = (int(max(p[i] for p in pixels)) + 1 for i in (0, 1))
        size = (right - left + 1, bottom - top + 1)
        cloth = Image.new("RGB", size, color)
        draw = ImageDraw.Draw(cloth)
        step = max(2.0, period * self.height)
        if pattern in ("hoops", "checks"):
            for k in range(int(size[1] / step) + 1):
                draw.rectangle((0, (k + 0.5) * step, size[0], (k + 1) * step - 1), fill=accent)
        if pattern in ("stripes", "checks"):
            middle = self.x - left
            for k in range(-int(middle / step) - 2, int((size[0] - middle) / step) + 2):
                x = middle + (k + 0.25) * step
                if pattern == "stripes":
                    draw.rectangle((x, 0, x + 0.5 * step - 1, size[1]), fill=accent)
                else:
                    draw.rectangle((x, 0, x + 0.3 * step, size[1]), fill=_shade(color, 0.6))
        if pattern == "yoke":
            draw.rectangle((0, 0, size[0], 0.36 * size[1]), fill=accent)
        if pattern == "logo":
            x, y, r = self.x - left, 0.4 * size[1], 0.055 * self.height
            draw.rectangle((x - r, y - r, x + r, y + r), fill=accent)
        mask = Image.new("L", size, 0)
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in pixels], fill=255)
        self.image.paste(cloth, (left, top), mask)


def draw_person(
    image: Image.Image,
    identity: Identity,
    pose: Pose,
    x: float,
    top: float,
    height: float,
    elevation: float = 0.0,
) -> None:
    """Draw a person onto an RGB image, in place.

    Args:
        image: RGB image; what falls outside is cut off.
        identity: The traits of the person.
        pose: Facing and walking phase.
        x: Pixel column of the body's middle.
        top: Pixel row of the top of the head.
        height: Pixels from head to feet.
        elevation: 0 for a camera at body height, 0.3 for one far above.

    Example:
        >>> canvas = Image.new("RGB", (64, 128), "grey")
        >>> person = sample_identity(np.random.default_rng(0))
        >>> draw_person(canvas, person, Pose("front", 0.0), x=32, top=8, height=112)
    """
    pen, side = _Pen(image, x, top, height, elevation), pose.side
    swing = float(np.sin(pose.phase))
    if side:
        # The far arm and a bag in the far hand are drawn first: the body hides them.
        _arm(pen, identity, side, -swing, far=True)
        if side < 0:
            _bag(pen, identity, pose, swing)
        _legs(pen, identity, side, swing)
        _torso(pen, identity, pose)
        if side > 0 or identity.bag == "backpack":
            _bag(pen, identity, pose, swing)
        _head(pen, identity, pose)
        _arm(pen, identity, side, swing, far=False)
        return
    _legs(pen, identity, 0, swing)
    _torso(pen, identity, pose)
    for arm in (-1, 1):
        _arm(pen, identity, 0, swing * arm, far=False, arm=arm)
    _bag(pen, identity, pose, swing)
    _head(pen, identity, pose)


def _half_widths(identity: Identity, side: int) -> tuple[float, float]:
    """Half widths at shoulder and hip."""
    shoulder, hip = (0.07, 0.065) if side else (0.105, 0.082)
    return shoulder * identity.width, hip * identity.width


def _legs(pen: _Pen, identity: Identity, side: int, swing: float) -> None:
    hip, thick = 1 - identity.leg, 0.075 * identity.width
    knee_y = hip + 0.48 * (0.95 - hip)
    for leg in (-1, 1):
        s = swing * leg
        lift = 0.05 * max(0.0, s)
        if side:
            joints = [
                (0.0, hip),
                (side * 0.11 * s, knee_y),
                (side * (0.2 * s - 0.3 * lift), 0.95 - 0.5 * lift),
            ]
        else:
            offset = leg * 0.042 * identity.width
            joints = [(offset, hip), (offset * 1.1, knee_y - lift), (offset * 1.15, 0.95 - lift)]
        dark = 0.78 if leg < 0 else 1.0
        skin, cloth = _shade(identity.skin, dark), _shade(identity.lower, dark)
        pen.limb(joints[1:], thick * 0.7, skin)
        if identity.lower_kind == "trousers":
            pen.limb(joints[1:], thick * 0.85, cloth)
            pen.limb(joints[:2], thick, cloth)
        elif identity.lower_kind == "shorts":
            pen.limb(joints[:2], thick * 1.1, cloth)
        else:
            pen.limb(joints[:2], thick * 0.8, skin)
        accent = _shade(_TRIM, dark)
        if identity.lower_pattern == "seam" and identity.lower_kind != "skirt":
            end = 3 if identity.lower_kind == "trousers" else 2
            edge = 0.0 if side else leg * thick * 0.3
            pen.limb([(x + edge, y) for x, y in joints[:end]], 0.018, accent)
        elif identity.lower_pattern == "bands" and identity.lower_kind == "trousers":
            (x0, y0), (x1, y1) = joints[1:]
            for share in (0.25, 0.65):
                x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
                pen.box(x, y, thick * 0.45, y + 0.03, accent)
        foot_x, foot_y = joints[2]
        toe = side * 0.035
        pen.oval(foot_x + toe, foot_y + 0.022, 0.055 if side else 0.034, 0.024, _shade(identity.shoes, dark))
    if identity.lower_kind == "skirt":
        hem, (_, half) = hip + 0.55 * (0.95 - hip), _half_widths(identity, side)
        pattern = {"seam": "stripes", "bands": "hoops"}.get(identity.lower_pattern, "plain")
        flare = half + 0.045 + (0.02 * abs(swing) if side else 0)
        pen.fabric([(-half, hip - 0.02), (half, hip - 0.02), (flare, hem), (-flare, hem)],
                   identity.lower, _TRIM, pattern, 0.07)  # fmt: skip


def _torso(pen: _Pen, identity: Identity, pose: Pose) -> None:
    shoulder, hip_half = _half_widths(identity, pose.side)
    hip = 1 - identity.leg
    pen.limb([(0, 0.11), (0, 0.17)], 0.05, _shade(identity.skin, 0.9))
    hem = hip + 0.02 + identity.coat
    hem_half = hip_half + 0.2 * identity.coat
    # A logo is on the chest; from behind and from the side it cannot be seen.
    pattern = "plain" if identity.pattern == "logo" and pose.facing != "front" else identity.pattern
    outline = [(-shoulder * 0.6, 0.145), (shoulder * 0.6, 0.145), (shoulder, 0.185), (hip_half, hip),
               (hem_half, hem), (-hem_half, hem), (-hip_half, hip), (-shoulder, 0.185)]  # fmt: skip
    pen.fabric(outline, identity.upper, identity.accent, pattern, identity.period)


def _arm(pen: _Pen, identity: Identity, side: int, swing: float, far: bool, arm: int = 1) -> None:
    shoulder, _ = _half_widths(identity, side)
    thick, dark = 0.048 * identity.width, 0.72 if far else 0.86
    if side:
        joints = [(0.0, 0.19), (-side * 0.08 * swing, 0.33), (-side * (0.16 * swing - 0.03), 0.46)]
    else:
        reach = shoulder * arm
        joints = [(reach, 0.19), (reach * 1.2, 0.33), (reach * 1.25, 0.47 - 0.04 * max(0.0, swing))]
    skin, sleeve = _shade(identity.skin, dark), _shade(identity.upper, dark)
    pen.limb(joints[1:], thick * 0.85, sleeve if identity.long_sleeves else skin)
    pen.limb(joints[:2], thick, sleeve)
    pen.oval(*joints[2], 0.022, 0.026, skin)


def _bag(pen: _Pen, identity: Identity, pose: Pose, swing: float) -> None:
    color, facing, side = identity.bag_color, pose.facing, pose.side
    shoulder, hip_half = _half_widths(identity, side)
    hip = 1 - identity.leg
    if identity.bag == "backpack":
        if facing == "back":
            half = 0.8 * shoulder
            pen.polygon([(-half, 0.2), (-half * 0.7, 0.165), (half * 0.7, 0.165), (half, 0.2), (half, 0.41),
                         (-half, 0.41)], color)  # fmt: skip
            pen.box(0, 0.31, half * 0.7, 0.39, _shade(color, 0.7))
        elif side:
            pen.oval(-side * (shoulder + 0.035), 0.28, 0.062, 0.115, color)
        else:
            for strap in (-0.62, 0.62):
                pen.limb([(strap * shoulder, 0.155), (strap * shoulder, 0.36)], 0.026, color)
    elif identity.bag != "none":
        # Carried on the person's right: the left of a front view, the right of a back view.
        hand = {"front": -1, "back": 1}.get(facing, 0)
        x = hand * (hip_half + 0.05) if hand else side * 0.1 * swing
        if identity.bag == "handbag":
            y = 0.5
            pen.limb([(x - 0.03, y + 0.02), (x, y - 0.05), (x + 0.03, y + 0.02)], 0.012, _shade(color, 0.7))
            pen.polygon([(x - 0.055, y + 0.01), (x + 0.055, y + 0.01), (x + 0.07, y + 0.11),
                         (x - 0.07, y + 0.11)], color)  # fmt: skip
        else:
            pen.limb([(-hand * shoulder * 0.7, 0.16), (x, hip - 0.02)], 0.022, color)
            pen.box(x, hip - 0.04, 0.06, hip + 0.05, color)


def _head(pen: _Pen, identity: Identity, pose: Pose) -> None:
    side, hair, skin = pose.side, identity.hair, identity.skin
    fall = 0.17 if identity.long_hair else 0.075
    if pose.facing == "back":
        pen.oval(0, 0.065, 0.05, 0.062, hair)
        if identity.long_hair:
            pen.polygon([(-0.05, 0.06), (0.05, 0.06), (0.045, fall + 0.03), (-0.045, fall + 0.03)], hair)
    elif side:
        if identity.long_hair:
            pen.polygon([(-side * 0.055, 0.05), (0, 0.05), (-side * 0.01, fall), (-side * 0.06, fall)], hair)
        pen.oval(0, 0.065, 0.048, 0.062, hair)
        pen.oval(side * 0.018, 0.078, 0.034, 0.05, skin)
    else:
        pen.oval(0, 0.06, 0.052, 0.06, hair)
        if identity.long_hair:
            for edge in (-1, 1):
                pen.limb([(edge * 0.042, 0.06), (edge * 0.045, fall)], 0.026, hair)
        pen.oval(0, 0.078, 0.039, 0.052, skin)
    if identity.hat is not None:
        pen.oval(0, 0.03, 0.053, 0.036, identity.hat)
        if pose.facing != "back":
            pen.oval(side * 0.05, 0.05, 0.045, 0.01, _shade(identity.hat, 0.7))
