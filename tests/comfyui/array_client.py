"""The scripts' client with pictures as arrays, for tests that compare pixels."""

import hashlib
import io
from typing import Any

import numpy as np
from comfy_client import ComfyClient, Result
from PIL import Image


def to_png(array: np.ndarray) -> bytes:
    """PNG bytes of a picture [H, W], [H, W, 3] or [H, W, 4], uint8 or float from 0 to 1."""
    if array.dtype != np.uint8:
        array = np.round(np.clip(array, 0, 1) * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def from_file(data: bytes) -> np.ndarray:
    """A picture file as float32 [H, W, C] from 0 to 1, with the channels that the file has."""
    array = np.asarray(Image.open(io.BytesIO(data)), dtype=np.float32) / 255
    return array if array.ndim == 3 else array[..., None]


class ArrayClient(ComfyClient):
    """A ComfyClient for tests: previews are kept in `events`, pictures go in and out as arrays."""

    def __init__(self, url: str):
        super().__init__(url, keep_previews=True)

    def upload_array(self, array: np.ndarray) -> str:
        """Upload a picture (see `to_png`) and return the name that LoadImage takes."""
        data = to_png(array)
        return self.upload(data, f"{hashlib.sha256(data).hexdigest()[:16]}.png")

    def arrays(self, result: Result, type: str | None = "output") -> list[np.ndarray]:
        """The pictures of a result as float32 [H, W, C] from 0 to 1."""
        return [from_file(self.download(image)) for image in result.images(type)]

    def pictures(self, workflow: dict[str, Any], timeout_s: float = 300) -> list[np.ndarray]:
        """Run a workflow and return the pictures that it saved."""
        return self.arrays(self.run(workflow, timeout_s=timeout_s))
