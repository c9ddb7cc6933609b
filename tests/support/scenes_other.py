"""Scenes for the demo model from an independent renderer: it uses distances instead of polygons, smooth
edges, CSS colours, and outlines in colours that no training scene has. Only the questions about a scene come
from the package."""

import math

import numpy as np
from PIL import Image

from paligemma.demo.scenes import Scene, Shape

CSS = {
    "red": [(255, 0, 0), (220, 20, 60), (178, 34, 34)],  # red, crimson, firebrick
    "green": [(0, 128, 0), (34, 139, 34), (50, 205, 50)],  # green, forestgreen, limegreen
    "blue": [(0, 0, 255), (30, 144, 255), (65, 105, 225)],  # blue, dodgerblue, royalblue
    "yellow": [(255, 255, 0), (255, 215, 0)],  # yellow, gold
    "purple": [(128, 0, 128), (148, 0, 211), (138, 43, 226)],  # purple, darkviolet, blueviolet
    "orange": [(255, 165, 0), (255, 140, 0)],  # orange, darkorange
}
GROUNDS = [
    (255, 255, 255),
    (245, 245, 220),
    (240, 248, 255),
    (211, 211, 211),
]  # white, beige, aliceblue, lightgrey
OUTLINES = [
    (139, 69, 19),
    (0, 128, 128),
    (25, 25, 112),
    (128, 0, 0),
]  # saddlebrown, teal, midnightblue, maroon
LARGEST = (0, 34, 30, 24, 21)  # hundredths of the picture, by the number of shapes


def draw(seed: int, width: int, height: int) -> Scene:
    """0 to 4 shapes with at least the distances of the package's scenes."""
    rng = np.random.default_rng([seed, width, height])
    count = 0 if rng.random() < 0.05 else int(rng.integers(1, 5))
    pixels = np.full((height, width, 3), GROUNDS[rng.integers(len(GROUNDS))], np.float32)
    shapes, outlined = [], rng.random() < 0.4
    for x, y, radius in places(rng, count, width, height):
        kind, colour = str(rng.choice(list(KINDS))), str(rng.choice(list(CSS)))
        far = 1.4 * radius
        place = np.s_[
            max(0, int(y - far)) : min(height, int(y + far)), max(0, int(x - far)) : min(width, int(x + far))
        ]
        down, across = np.mgrid[place] + 0.5
        d = distance(kind, across - x, down - y, radius, rng.uniform(-0.12, 0.12))
        inside = np.argwhere(d < 0) + np.array([place[0].start, place[1].start])
        (y0, x0), (y1, x1) = inside.min(axis=0), inside.max(axis=0) + 1
        shapes.append(Shape(colour, kind, (y0 / height, x0 / width, y1 / height, x1 / width)))
        border = rng.uniform(0.008, 0.02) * min(width, height) if outlined else 0.0
        outline, fill = OUTLINES[rng.integers(len(OUTLINES))], CSS[colour][rng.integers(len(CSS[colour]))]
        for ink, edge in ((outline, 0.0), (fill, border)):
            cover = np.clip(0.5 - (d + edge), 0, 1)[..., None]
            pixels[place] += cover * (np.array(ink) - pixels[place])
    return Scene(
        Image.fromarray(pixels.round().astype(np.uint8)),
        tuple(sorted(shapes, key=lambda shape: shape.centre[1])),
    )


KINDS = {
    "circle": (0, 1.0, 0.0),
    "square": (4, 0.9, 0.0),
    "triangle": (3, 0.62, 0.31),
    "star": (5, 0.36, 0.11),
}  # edges, how far out, how far down


def distance(kind: str, x: np.ndarray, y: np.ndarray, radius: float, turn: float) -> np.ndarray:
    """The distance of each pixel from a shape, negative inside. A polygon is the intersection of the half
    planes of its edges; a star is where four of five intersect."""
    edges, out, lower = KINDS[kind]
    if not edges:
        return np.hypot(x, y) - radius
    angles = turn + math.pi / 2 + 2 * math.pi * np.arange(edges) / edges
    planes = np.sort(
        [x * math.cos(a) + (y - lower * radius) * math.sin(a) - out * radius for a in angles], axis=0
    )
    return planes[-2] if kind == "star" else planes[-1]


def places(
    rng: np.random.Generator, count: int, width: int, height: int
) -> list[tuple[float, float, float]]:  # x, y, radius in pixels
    side, narrow, found = math.sqrt(width * height), min(width, height), []
    largest = min(LARGEST[count] / 100 * side * math.sqrt(narrow / side), 0.4 * narrow)
    while len(found) < count:
        radius = rng.uniform(0.125 * side, largest)
        reach = 1.15 * radius  # of a star turned aside
        x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
        if all(
            apart(abs(x - a), abs(y - b), reach + 1.15 * r, width, height, count == 2) for a, b, r in found
        ):
            found.append((x, y, radius))
        elif rng.random() < 0.05:
            found = []  # they may have been laid so that no other fits
    return found


def apart(dx: float, dy: float, reach: float, width: int, height: int, two: bool) -> bool:
    across, down = dx / width, dy / height
    return (
        max(dx, dy) > reach + 0.02 * max(width, height)
        and across > 0.06
        and (not two or abs(across - down) > 0.1)
    )
