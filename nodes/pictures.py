"""What a chart has to become to be an IMAGE."""

import numpy as np
import torch


def as_image(array: np.ndarray) -> torch.Tensor:
    """IMAGE ``[1, H, W, 3]`` of uint8 ``[H, W, 3]``."""
    return torch.from_numpy(array).float().div(255)[None]
