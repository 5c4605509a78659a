"""The VAE's arithmetic on one frame against the causal 3D form that it stands for."""

import pytest
import torch
import torch.nn.functional as F

from qwen_edit.vae import convolve_frame, rms_norm


@pytest.mark.parametrize(("depth", "side"), [(3, 3), (1, 1)])
def test_convolution_equals_the_causal_one_behind_zeros(depth, side):
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 6, depth, side, side, generator=g), torch.randn(8, generator=g)
    x = torch.randn(2, 6, 5, 7, generator=g).contiguous(memory_format=torch.channels_last)
    edge = side // 2
    behind_zeros = F.pad(x.unsqueeze(2), (edge, edge, edge, edge, depth - 1, 0))
    expected = F.conv3d(behind_zeros, weight, bias)[:, :, 0]
    torch.testing.assert_close(convolve_frame(x, weight, bias, (edge, edge)), expected)


def test_norm_is_wans_also_where_a_pixel_is_zero():
    x = torch.randn(1, 12, 3, 4)
    x[..., 1, 2] = 0
    gamma = torch.randn(12, 1, 1, 1)
    expected = F.normalize(x, dim=1) * 12**0.5 * gamma[:, 0]
    torch.testing.assert_close(rms_norm(x, gamma), expected)
