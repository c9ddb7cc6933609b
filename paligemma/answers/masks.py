"""Decodes the 16 codes of a mask to the mask; reference/mask_decoder.py is the reference. Module names are
those of vae-oid.npz."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import mask_weights


class ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class Codebook(nn.Module):
    def __init__(self, E: int):
        super().__init__()
        self._embedding = nn.Parameter(torch.empty(mask_weights.CODES, E))


class MaskDecoder(nn.Module):
    """Decodes codes to masks: `processor.parse(..., mask_decoder=MaskDecoder.load())`. It computes in
    float32, some 60 MFLOP for each mask."""

    def __init__(self, E: int):
        super().__init__()
        self._vq_vae = Codebook(E)
        layers: list[nn.Module] = [nn.Conv2d(E, 128, 1), nn.ReLU(), ResBlock(128), ResBlock(128)]
        for size_in, size_out in ((128, 128), (128, 64), (64, 32), (32, 16)):
            layers += [nn.ConvTranspose2d(size_in, size_out, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(16, 1, 1))

    @classmethod
    def load(cls, path: str | Path | None = None, *, local_files_only: bool = False) -> "MaskDecoder":
        """The decoder with the weights of vae-oid.npz: the file at `path`, or the one that the first call
        downloads. Raises PaliGemmaError for a file that is not this decoder, or cannot be downloaded."""
        weights = mask_weights.read(mask_weights.find(path, local_files_only=local_files_only))
        with torch.device("meta"):
            decoder = cls(weights[mask_weights.EMBEDDING].shape[1])
        tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
        decoder.load_state_dict(tensors, strict=True, assign=True)
        return decoder.requires_grad_(False).eval()

    def forward(self, codes: np.ndarray | Tensor) -> Tensor:  # (N, 16) -> (N, 64, 64)
        """Masks, with values from about -1 to 1, above 0 where the object is. The 16 codes of a mask are the
        rows of a 4 x 4 grid."""
        embedding = self._vq_vae._embedding
        x = embedding[torch.as_tensor(codes, device=embedding.device)].unflatten(1, (4, 4))
        return self.decoder(x.permute(0, 3, 1, 2))[:, 0]
