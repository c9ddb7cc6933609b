"""Scenes for the demo model from an independent renderer.

It uses distances instead of polygons, smooth edges, CSS colours, and outlines in colours that no training
scene has. Only the questions about a scene come from the package.
"""

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
# white, beige, aliceblue, lightgrey
GROUNDS = [(255, 255, 255), (245, 245, 220), (240, 248, 255), (211, 211, 211)]
# saddlebrown, teal, midnightblue, maroon
OUTLINES = [(139, 69, 19), (0, 128, 128), (25, 25, 112), (128, 0, 0)]
# The largest radius for 0 to 4 shapes, in hundredths of the picture's size.
LARGEST = (0, 34, 30, 24, 21)
# For each kind: the number of edges, their distance from the centre, how far down the centre is (in radii).
KINDS = {"circle": (0, 1, 0), "square": (4, 0.9, 0), "triangle": (3, 0.62, 0.31), "star": (5, 0.36, 0.11)}


def draw(seed: int, width: int, height: int) -> Scene:
    """A scene of 0 to 4 shapes, which are at least as far apart as those of the package's scenes."""
    rng = np.random.default_rng([seed, width, height])
    count = 0 if rng.random() < 0.05 else int(rng.integers(1, 5))
    pixels = np.full((height, width, 3), GROUNDS[rng.integers(len(GROUNDS))], np.float32)
    shapes, outlined = [], rng.random() < 0.4
    for x, y, radius in places(rng, count, width, height):
        kind, colour = str(rng.choice(list(KINDS))), str(rng.choice(list(CSS)))
        far = 1.4 * radius
        rows = slice(max(0, int(y - far)), min(height, int(y + far)))
        columns = slice(max(0, int(x - far)), min(width, int(x + far)))
        place = rows, columns
        down, across = np.mgrid[place] + 0.5
        d = distance(kind, across - x, down - y, radius, rng.uniform(-0.12, 0.12))
        inside = np.argwhere(d < 0) + np.array([rows.start, columns.start])
        (y0, x0), (y1, x1) = inside.min(axis=0), inside.max(axis=0) + 1
        shapes.append(Shape(colour, kind, (y0 / height, x0 / width, y1 / height, x1 / width)))
        border = rng.uniform(0.008, 0.02) * min(width, height) if outlined else 0.0
        outline, fill = OUTLINES[rng.integers(len(OUTLINES))], CSS[colour][rng.integers(len(CSS[colour]))]
        for ink, edge in ((outline, 0.0), (fill, border)):
            cover = np.clip(0.5 - (d + edge), 0, 1)[..., None]
            pixels[place] += cover * (np.array(ink) - pixels[place])
    image = Image.fromarray(pixels.round().astype(np.uint8))
    return Scene(image, tuple(sorted(shapes, key=lambda shape: shape.centre[1])))


def distance(kind: str, x: np.ndarray, y: np.ndarray, radius: float, turn: float) -> np.ndarray:
    """The distance of each pixel from a shape, negative inside.

    A polygon is the intersection of the half planes of its edges; a star is where four of its five intersect.
    """
    edges, out, lower = KINDS[kind]
    if not edges:
        return np.hypot(x, y) - radius
    angles = turn + math.pi / 2 + 2 * math.pi * np.arange(edges) / edges
    planes = [x * math.cos(a) + (y - lower * radius) * math.sin(a) - out * radius for a in angles]
    planes = np.sort(planes, axis=0)
    return planes[-2] if kind == "star" else planes[-1]


def places(rng: np.random.Generator, count: int, width: int, height: int) -> list[tuple[float, float, float]]:
    """x, y and radius of each shape, in pixels."""
    side, narrow, found = math.sqrt(width * height), min(width, height), []
    largest = min(LARGEST[count] / 100 * side * math.sqrt(narrow / side), 0.4 * narrow)
    while len(found) < count:
        radius = rng.uniform(0.125 * side, largest)
        reach = 1.15 * radius  # the farthest point of a turned star
        x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
        distances = [(abs(x - a), abs(y - b), reach + 1.15 * r) for a, b, r in found]
        if all(apart(*distance, width, height, count == 2) for distance in distances):
            found.append((x, y, radius))
        elif rng.random() < 0.05:
            found = []  # the shapes found so far may leave no place for another
    return found


def apart(dx: float, dy: float, reach: float, width: int, height: int, two: bool) -> bool:
    """Whether two shapes are far enough apart. If the scene has only `two`, they are not on a diagonal."""
    across, down = dx / width, dy / height
    overlap = max(dx, dy) <= reach + 0.02 * max(width, height)
    return not overlap and across > 0.06 and (not two or abs(across - down) > 0.1)
