"""The prompts and the answers about a scene: captions, detections and questions. The answers are right by
construction. Prompts are PaliGemma's, without their prefix tokens."""

from collections.abc import Callable

import numpy as np

from .scenes import COLOURS, KINDS, Box, Shape


def caption(shapes: tuple[Shape, ...]) -> str:
    """The answer to "caption en": the shapes from left to right; for two shapes, their relation."""
    named = [with_article(shape.name) for shape in shapes]
    if not named:
        return "no shapes"
    if len(named) == 2:
        (y0, x0), (y1, x1) = (shape.centre for shape in shapes)
        if abs(y1 - y0) > abs(x1 - x0):
            return f"{named[0]} above {named[1]}" if y0 < y1 else f"{named[1]} above {named[0]}"
        return f"{named[0]} left of {named[1]}"
    return " and ".join([", ".join(named[:-1]), named[-1]] if named[1:] else named)


def with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def detect(queries: list[str], shapes: tuple[Shape, ...]) -> list[tuple[str, Box]]:
    """Label and box of each shape that matches a query, from left to right. A query is a name such as "red
    circle", a kind such as "circle", or "shape"."""
    pairs = ((query, shape) for shape in shapes for query in queries)
    return [(query, shape.box) for query, shape in pairs if query in (shape.name, shape.kind, "shape")]


def boxes_text(found: list[tuple[str, Box]]) -> str:
    """Boxes as PaliGemma writes them: <locYYYY><locXXXX><locYYYY><locXXXX> label ; ..."""
    locs = ["".join(f"<loc{min(int(v * 1024), 1023):04}>" for v in box) for _, box in found]
    return " ; ".join(f"{loc} {label}" for loc, (label, _) in zip(locs, found, strict=True))


def random_query(rng: np.random.Generator, shapes: tuple[Shape, ...], *, tricky: bool = False) -> list[str]:
    """What to detect; most queries name a shape of the scene. With `tricky`, half of the queries are two
    names, of which one is usually absent."""
    style = rng.choice(4, p=(0.25, 0.1, 0.15, 0.5) if tricky else (0.4, 0.2, 0.2, 0.2))
    if style == 2:
        return ["shape"]
    names = sorted({shape.name if style != 1 else shape.kind for shape in shapes})
    if not names or rng.random() < 0.08:
        return [_random_name(rng) if style != 1 else str(rng.choice(KINDS))]
    if style == 3 and tricky and rng.random() < 0.6:
        return _misleading(rng, shapes)
    if style == 3:
        others = [*names, _random_name(rng)]
        return list(dict.fromkeys(map(str, rng.permutation(others)[:2])))
    return [str(rng.choice(names))]


def _misleading(rng: np.random.Generator, shapes: tuple[Shape, ...]) -> list[str]:
    """The name of a shape, and a name that shares either its colour or its kind with another shape."""
    one, other = (shapes[i] for i in rng.integers(len(shapes), size=2))
    same = other.kind == one.kind
    absent = f"{other.colour} {rng.choice(KINDS)}" if same else f"{rng.choice(COLOURS)} {other.kind}"
    return list(dict.fromkeys(map(str, rng.permutation([one.name, absent]))))


def _random_name(rng: np.random.Generator) -> str:
    return f"{rng.choice(COLOURS)} {rng.choice(KINDS)}"


def random_question(rng: np.random.Generator, shapes: tuple[Shape, ...]) -> tuple[str, str]:
    """A question and its answer."""
    asking: list[Callable] = [_how_many, _how_many, _what_colour, _what_shape, _is_there]
    while True:
        asked = asking[rng.integers(len(asking))](rng, shapes)
        if asked:
            return asked


def _how_many(rng: np.random.Generator, shapes: tuple[Shape, ...]) -> tuple[str, str]:
    style, present = rng.integers(3), rng.random() < 0.8
    if style == 0:
        return "how many shapes?", str(len(shapes))
    if style == 1:
        kind = rng.choice([shape.kind for shape in shapes] if shapes and present else KINDS)
        return f"how many {kind}s?", str(sum(shape.kind == kind for shape in shapes))
    colour = rng.choice([shape.colour for shape in shapes] if shapes and present else COLOURS)
    return f"how many {colour} shapes?", str(sum(shape.colour == colour for shape in shapes))


def _what_colour(rng: np.random.Generator, shapes: tuple[Shape, ...]) -> tuple[str, str] | None:
    single = [shape for shape in shapes if sum(other.kind == shape.kind for other in shapes) == 1]
    if not single:
        return None
    shape = single[rng.integers(len(single))]
    return f"what {rng.choice(['colour', 'color'])} is the {shape.kind}?", shape.colour


def _what_shape(rng: np.random.Generator, shapes: tuple[Shape, ...]) -> tuple[str, str] | None:
    single = [shape for shape in shapes if sum(other.colour == shape.colour for other in shapes) == 1]
    if not single:
        return None
    shape = single[rng.integers(len(single))]
    return f"what shape is the {shape.colour} object?", shape.kind


def _is_there(rng: np.random.Generator, shapes: tuple[Shape, ...]) -> tuple[str, str]:
    """Half of the questions name a shape of the scene, a quarter a colour and a kind of the scene, which may
    be those of different shapes, and a quarter any colour and kind."""
    style, name = rng.integers(4), _random_name(rng)
    if shapes and style < 2:
        name = shapes[rng.integers(len(shapes))].name
    elif shapes and style == 2:
        colour = rng.choice([shape.colour for shape in shapes])
        name = f"{colour} {rng.choice([shape.kind for shape in shapes])}"
    return f"is there {with_article(name)}?", "yes" if any(shape.name == name for shape in shapes) else "no"
