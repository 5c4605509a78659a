"""Pictures between ComfyUI's floats and diffusers' 8 bits: the same rounding, the same bits wherever they are made."""

import numpy as np
import pytest
import torch

from qwen_edit.pictures import to_pil, to_tensor

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
ALL_LEVELS = torch.arange(256, dtype=torch.float32)


def test_rounds_to_the_nearest_level_and_halves_to_the_even_one_as_torch_does():
    halves = (ALL_LEVELS + 0.5) / 255
    around = torch.cat(
        [halves, halves.nextafter(torch.tensor(0.0)), halves.nextafter(torch.tensor(2.0)), -halves, halves + 1]
    )
    image = torch.cat([around, torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1])[:2280].view(
        20, 38, 3
    )
    expected = image.mul(255).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(torch.from_numpy(np.array(to_pil(image))), expected)
    assert {0, 255} <= set(expected.flatten().tolist())


def test_leaves_the_picture_alone():
    image = torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    to_pil(image)
    assert torch.equal(image, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_takes_every_float(dtype):
    image = torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert to_pil(image).tobytes() == to_pil(image.float()).tobytes()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_every_level_comes_back_correctly_rounded(device):
    levels = to_tensor(to_pil((ALL_LEVELS / 255).view(1, 256, 1).expand(1, 256, 3)), device)
    assert levels.device.type == device
    expected = (np.arange(256) / np.float64(255)).astype(np.float32)
    assert np.array_equal(levels[0, 0, :, 0].cpu().numpy(), expected)
