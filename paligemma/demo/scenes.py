"""The scenes of the demo model: random pictures of coloured shapes.

A scene has 0 to 4 shapes. Sizes and distances are in units of 1/112 of the picture's side; a unit is one
pixel of the model's input. Each question about a scene has one right answer, so that an exact match is a fair
test: lists and boxes are ordered from left to right, and the centres of shapes are far enough apart for that
order. If there are two shapes, one is clearly above or clearly left of the other."""

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

UNITS = 112  # a side of the picture in units
KINDS = ("circle", "square", "triangle", "star")
HUES = {  # colour -> the range of its hue in degrees, of its saturation, and of its value
    "red": ((-14, 8), (0.7, 1.0), (0.5, 1.0)),
    "green": ((82, 165), (0.5, 1.0), (0.4, 1.0)),
    "blue": ((195, 245), (0.55, 1.0), (0.45, 1.0)),
    "yellow": ((49, 64), (0.65, 1.0), (0.85, 1.0)),
    "purple": ((265, 305), (0.4, 1.0), (0.4, 1.0)),
    "orange": ((22, 41), (0.8, 1.0), (0.85, 1.0)),
}
COLOURS = tuple(HUES)
SHARES = (0.05, 0.20, 0.25, 0.25, 0.25)  # shares of scenes with 0, 1, .. 4 shapes
RADIUS = 11.5  # units: the smallest radius
LARGEST = (0, 36, 32, 26, 22)  # units: the largest radius, by the number of shapes
WAIST = 0.48  # radius of a star between its points; the radius at its points is 1.15
GAP = 2  # units: the smallest distance between boxes, and from a box to the edge
APART = 5  # units: the smallest horizontal distance of two centres
CLEARLY = 9  # units: the smallest difference of |dx| and |dy| in a scene of two shapes

Box = tuple[float, float, float, float]  # y0, x0, y1, x1 in 0..1 of the picture, as in <loc> order
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    colour: str
    kind: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def centre(self) -> tuple[float, float]:  # y, x
        y0, x0, y1, x1 = self.box
        return (y0 + y1) / 2, (x0 + x1) / 2


@dataclass(frozen=True)
class Scene:
    """A picture, and its shapes from left to right."""

    picture: Image.Image
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Place:
    """The centre and the size of a shape, in units."""

    x: float
    y: float
    radius: float
    stretch: float  # width over height of a circle, in units

    @property
    def reach(self) -> tuple[float, float]:
        """Half of the width and of the height that every kind of shape fits into."""
        wide = math.sqrt(self.stretch)
        return 1.12 * self.radius * wide, 1.12 * self.radius / wide


def corners(
    kind: str, place: Place, turn: float, thinner: float = 0.0, waist: float = WAIST
) -> list[tuple[float, float]]:  # x, y in units
    """The corners of a shape that is turned by `turn` radians, with about `thinner` units taken off on every
    side."""
    if kind == "circle":
        radii, start, inset, lift = [1.0] * 72, 0.0, 1.0, 0.0
    elif kind == "square":
        radii, start, inset, lift = [1.3] * 4, math.pi / 4, math.sqrt(2), 0.0
    elif kind == "triangle":  # the lift moves the middle of its box to the place
        radii, start, inset, lift = [1.18] * 3, -math.pi / 2, 2.0, 0.295
    else:
        radii, start, inset, lift = [1.15, waist] * 5, -math.pi / 2, 2.2, 0.11
    size = place.radius - thinner * inset / max(radii)
    wide = math.sqrt(place.stretch)
    angles = [start + turn + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [
        (
            place.x + wide * size * radius * math.cos(angle),
            place.y + (size * radius * math.sin(angle) + lift * place.radius) / wide,
        )
        for radius, angle in zip(radii, angles, strict=True)
    ]


def random_scene(rng: np.random.Generator, *, squeezed: float = 0.0, varied: bool = False) -> Scene:
    """A scene, drawn at 112 to 448 pixels.

    squeezed: the share of scenes that are not square, but up to twice as wide as high, or as high as wide.
    varied: stars are fatter or thinner, and squeezed scenes are squeezed more."""
    aspect = 1.0
    if rng.random() < squeezed:
        stretch = rng.uniform(-math.log(2), math.log(2))
        if varied:
            stretch = math.copysign(math.sqrt(abs(stretch) * math.log(2)), stretch)
        aspect = math.exp(stretch)
    places = _arrange(rng, int(rng.choice(len(SHARES), p=SHARES)), 1 / aspect)
    names = _names(rng, len(places))
    side = math.exp(rng.uniform(math.log(112), math.log(448)))
    width, height = round(side * math.sqrt(aspect)), round(side / math.sqrt(aspect))
    picture, backdrop = _background(rng, width, height)
    bordered = rng.random() < 0.2
    shapes = []
    for place, (colour, kind) in zip(places, names, strict=True):
        fill, turn = _fill(rng, colour, backdrop), math.radians(rng.uniform(-9, 9))
        waist = rng.uniform(0.4, 0.54) if varied else WAIST
        outer = _border(rng, fill) if bordered else fill
        box = _draw(picture, corners(kind, place, turn, waist=waist), outer)
        if bordered:
            _draw(picture, corners(kind, place, turn, rng.uniform(1, 3.5), waist), fill)
        shapes.append(Shape(colour, kind, box))
    if rng.random() < 0.45:
        picture = _grainy(rng, picture)
    return Scene(picture, tuple(sorted(shapes, key=lambda shape: shape.centre[1])))


def _names(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Colour and kind of each shape. Some scenes have few colours or kinds, so that some occur repeatedly."""
    colours = rng.permutation(COLOURS)[: rng.integers(1, 3) if rng.random() < 0.35 else None]
    kinds = rng.permutation(KINDS)[: rng.integers(1, 3) if rng.random() < 0.35 else None]
    return [(str(rng.choice(colours)), str(rng.choice(kinds))) for _ in range(count)]


def _arrange(rng: np.random.Generator, count: int, stretch: float) -> list[Place]:
    """Places for `count` shapes that keep the distances GAP, APART and CLEARLY."""
    longer = math.sqrt(max(stretch, 1 / stretch))  # the factor on the longer side of a stretched shape
    least = RADIUS * math.sqrt(longer)  # larger, so that a stretched shape is not too thin
    largest = min(LARGEST[count], 0.42 * UNITS / longer)
    while True:
        places: list[Place] = []
        for _ in range(40):
            if len(places) == count:
                return places
            radius = rng.uniform(least, largest)
            w, h = Place(0, 0, radius, stretch).reach
            x, y = rng.uniform(GAP + w, UNITS - GAP - w), rng.uniform(GAP + h, UNITS - GAP - h)
            new = Place(x, y, radius, stretch)
            if all(_apart(new, other, count == 2) for other in places):
                places.append(new)


def _apart(a: Place, b: Place, two: bool) -> bool:
    dx, dy = abs(a.x - b.x), abs(a.y - b.y)
    if dx < APART or (two and abs(dx - dy) < CLEARLY):
        return False
    (aw, ah), (bw, bh) = a.reach, b.reach
    return dx >= aw + bw + GAP or dy >= ah + bh + GAP


def _draw(picture: Image.Image, points: list[tuple[float, float]], fill: Colour) -> Box:
    """Fill a polygon, and return the box of the filled pixels."""
    mask = Image.new("L", picture.size)
    across, down = picture.width / UNITS, picture.height / UNITS
    pixels = [
        (x * across - 0.5, y * down - 0.5) for x, y in points
    ]  # whole numbers are the middles of pixels
    ImageDraw.Draw(mask).polygon(pixels, fill=255)
    box = mask.getbbox()
    assert box
    x0, y0, x1, y1 = box
    picture.paste(fill, box, mask.crop(box))
    return y0 / picture.height, x0 / picture.width, y1 / picture.height, x1 / picture.width


def _rgb(hue: float, saturation: float, value: float) -> Colour:  # degrees, 0..1, 0..1
    red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))
    return red, green, blue


def _fill(rng: np.random.Generator, colour: str, backdrop: Colour) -> Colour:
    """A colour of that name that stands out from the background."""
    while True:
        fill = _rgb(*(rng.uniform(*limits) for limits in HUES[colour]))
        if math.dist(fill, backdrop) > 95:
            return fill


def _border(rng: np.random.Generator, fill: Colour) -> Colour:
    """Black, white, a grey, or the fill darkened."""
    style = rng.integers(4)
    if style == 3:
        red, green, blue = (round(c * 0.45) for c in fill)
        return red, green, blue
    grey = (0, 255, int(rng.integers(30, 226)))[style]
    return grey, grey, grey


def _background(rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, Colour]:
    """A plain, graded or blotchy background, white, pale, medium or dark; and its mean colour."""
    tone = rng.choice(4, p=(0.15, 0.45, 0.25, 0.15))
    value = 1.0 if tone == 0 else rng.uniform(*((0.75, 1.0), (0.3, 0.75), (0.0, 0.3))[tone - 1])
    mean = _rgb(rng.uniform(0, 360), 0 if tone == 0 else rng.uniform(0, 0.2), value)
    style = rng.choice(3, p=(0.4, 0.3, 0.3))
    if style == 0:
        return Image.new("RGB", (width, height), mean), mean
    if style == 1:  # the brightness changes from corner to corner
        ends = rng.uniform(-40, 40, size=(2, 2, 1)) + rng.uniform(-8, 8, size=(2, 2, 3))
        filtering = Image.Resampling.BILINEAR
    else:
        n = int(rng.integers(3, 17))
        ends = rng.normal(0, rng.uniform(4, 16), size=(n, n, 1)) + rng.normal(0, 4, size=(n, n, 3))
        filtering = Image.Resampling.NEAREST if rng.random() < 0.5 else Image.Resampling.BILINEAR
    values = np.clip(np.array(mean) + ends, 0, 255).astype(np.uint8)
    return Image.fromarray(values).resize((width, height), filtering), mean


def _grainy(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """The picture with noise like a camera's, one grain for each unit."""
    grain = rng.normal(0, rng.uniform(2, 14), size=(UNITS, UNITS, 3)).clip(-127, 127)
    scaled = Image.fromarray((128 + grain).astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)
    return ImageChops.add(picture, scaled, offset=-128)
