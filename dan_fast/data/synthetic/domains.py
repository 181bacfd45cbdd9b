"""The named domains: how each differs in light, tone, image quality, background, boxes and occlusion."""

from dataclasses import dataclass
from typing import Literal

Color = tuple[int, int, int]
Structure = Literal["trees", "pillars", "lamps", "shops", "buildings", "containers"]
Occluder = Literal["pole", "car", "person"]


@dataclass(frozen=True)
class Domain:
    """Style of one synthetic domain; the three kinds of image of Fig. 1 of the DAN paper come from it.

    Light, tone and quality make images style-variant, ``misaligned`` and ``occluded`` make them misaligned;
    any domain becomes unlabelled by leaving its identities unread.

    Args:
        number: Unique from 1; seeds the domain's random numbers and leads its person ids.
        name: Folder name.
        structure: What stands in the background.
        walls: Colours of the background's structures.
        ground: Colour of the ground.
        brightness: Factor on linear light; 1 is neutral.
        contrast: Factor on the distance to mid-grey; 1 is neutral.
        warmth: -1 (blue) to 1 (orange).
        haze: Share of grey veil mixed in, 0 to 1.
        variation: Standard deviation, in log units, of each camera's colour gains and gamma.
        blur: Gaussian radius in pixels at 128 rows.
        noise: Standard deviation in grey levels (0 to 255).
        resolution: Share of the pixels along each side that survive, 0 to 1.
        jpeg_quality: Quality the files are saved at, 1 to 95.
        misaligned: Share of images with a box that is shifted or holds only a part of the body.
        occluded: Share of images with something in front of the person.
        occluders: What that something can be.

    Example:
        >>> DOMAINS["night"].brightness < DOMAINS["campus"].brightness
        True
    """

    number: int
    name: str
    structure: Structure
    walls: tuple[Color, ...]
    ground: Color
    brightness: float
    contrast: float
    warmth: float
    haze: float
    variation: float
    blur: float
    noise: float
    resolution: float
    jpeg_quality: int
    misaligned: float
    occluded: float
    occluders: tuple[Occluder, ...]


# Numbers are part of the seeds and of the person ids: add a domain at the end with a new one.
DOMAINS: dict[str, Domain] = {domain.name: domain for domain in (
    Domain(1, "campus", "trees", walls=((96, 140, 72), (70, 112, 60), (172, 150, 120)),
           ground=(150, 160, 120), brightness=1.15, contrast=1.1, warmth=0.35, haze=0.0, variation=0.14,
           blur=0.3, noise=3.0, resolution=1.0, jpeg_quality=90,
           misaligned=0.15, occluded=0.1, occluders=("pole", "person")),
    Domain(2, "station", "pillars", walls=((128, 138, 150), (100, 112, 128), (160, 166, 172)),
           ground=(112, 116, 124), brightness=0.75, contrast=0.9, warmth=-0.5, haze=0.08, variation=0.16,
           blur=0.6, noise=8.0, resolution=0.8, jpeg_quality=70,
           misaligned=0.25, occluded=0.35, occluders=("person", "pole")),
    Domain(3, "night", "lamps", walls=((60, 58, 70), (84, 72, 66), (48, 54, 76)),
           ground=(70, 68, 72), brightness=0.4, contrast=1.0, warmth=0.55, haze=0.0, variation=0.18,
           blur=0.7, noise=13.0, resolution=0.75, jpeg_quality=65,
           misaligned=0.25, occluded=0.2, occluders=("car", "pole")),
    Domain(4, "mall", "shops", walls=((214, 190, 160), (186, 120, 110), (120, 150, 176), (222, 210, 190)),
           ground=(204, 194, 180), brightness=1.3, contrast=0.95, warmth=0.6, haze=0.05, variation=0.14,
           blur=0.3, noise=4.0, resolution=1.0, jpeg_quality=80,
           misaligned=0.35, occluded=0.3, occluders=("person",)),
    Domain(5, "street", "buildings", walls=((150, 112, 96), (132, 128, 124), (168, 150, 128), (104, 96, 100)),
           ground=(104, 104, 108), brightness=0.95, contrast=1.15, warmth=-0.1, haze=0.0, variation=0.17,
           blur=0.4, noise=5.0, resolution=0.9, jpeg_quality=80,
           misaligned=0.2, occluded=0.35, occluders=("car", "pole", "person")),
    Domain(6, "harbour", "containers", walls=((150, 84, 60), (70, 104, 140), (110, 128, 104), (160, 150, 90)),
           ground=(138, 140, 140), brightness=1.0, contrast=0.75, warmth=-0.35, haze=0.22, variation=0.16,
           blur=0.8, noise=5.0, resolution=0.5, jpeg_quality=45,
           misaligned=0.4, occluded=0.15, occluders=("pole", "car")),
)}  # fmt: skip
