"""A file like vae-oid.npz with random weights, and the encoder that turns masks into codes."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from paligemma.answers import mask_weights

E = 24  # columns of the codebook; 512 in the published file


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of the decoder in the published layout, large enough for mask values above and below 0."""
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in mask_weights.expected_shapes(E).items():
        transposed = len(shape) == 4 and shape[2] == 4  # stride 2: each output sums 2 x 2 of the 4 x 4 taps
        taps = shape[0] * 4 if transposed else np.prod(shape[1:])
        scale = 0.2 if name.endswith("bias") else 1.0 if "_vq_vae" in name else np.sqrt(2 / taps)
        weights[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    weights["decoder.12.weight"] -= weights["decoder.12.weight"].mean()
    return weights


def encoder_weights(seed: int = 1) -> dict[str, np.ndarray]:
    """Stride-2 convolutions, two residual blocks and a last convolution, as in the published file."""
    rng, weights = np.random.default_rng(seed), {}

    def layer(name: str, *shape: int) -> None:
        weight = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        weights[f"encoder.{name}.weight"] = weight.astype(np.float32)
        weights[f"encoder.{name}.bias"] = (0.1 * rng.standard_normal(shape[0])).astype(np.float32)

    for i, (size_in, size_out) in enumerate([(1, 8), (8, 16), (16, 32), (32, 32)]):
        layer(f"{2 * i}", size_out, size_in, 4, 4)
    for block in (8, 9):
        for i, k in ((0, 3), (2, 3), (4, 1)):
            layer(f"{block}.net.{i}", 32, 32, k, k)
    layer("10", E, 32, 1, 1)
    return weights


def encode(mask: np.ndarray, weights: dict[str, np.ndarray]) -> list[int]:  # (64, 64) bool -> 16 codes
    """The codes of a mask: the nearest rows of the codebook."""
    w = {name: torch.from_numpy(array) for name, array in weights.items()}
    x = torch.from_numpy(mask.astype(np.float32))[None, None] * 2 - 1
    for i in (0, 2, 4, 6):
        x = F.relu(F.conv2d(x, w[f"encoder.{i}.weight"], w[f"encoder.{i}.bias"], stride=2, padding=1))
    for block in ("encoder.8.net", "encoder.9.net"):
        y = x
        for i in (0, 2, 4):
            y = F.conv2d(y, w[f"{block}.{i}.weight"], w[f"{block}.{i}.bias"], padding="same")
            y = F.relu(y) if i < 4 else y
        x = x + y
    x = F.conv2d(x, w["encoder.10.weight"], w["encoder.10.bias"])[0].flatten(1).T  # (16, E), row-major
    return torch.cdist(x / x.std(), w[mask_weights.EMBEDDING]).argmin(dim=1).tolist()


def write_npz(path: Path, weights: dict[str, np.ndarray] | None = None, *, save=np.savez) -> Path:
    with open(path, "wb") as file:
        save(file, **(random_weights() | encoder_weights() if weights is None else weights))
    return path
