"""Forwards that take the reference tokens' keys and values from an earlier forward."""

import pytest
import torch

from qwen_edit.attention import resolve
from qwen_edit.kernels import REFERENCE
from qwen_edit.reference_cache import ReferenceCache, cached_bytes
from qwen_edit.transformer import Forward, QwenEditTransformer, denoise

CPU = torch.device("cpu")
CONFIG = {
    "num_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 48,
    "axes_dims_rope": (8, 12, 12),
    "zero_cond_t": True,
}
GRIDS = ((4, 6), (5, 3), (6, 6))
OUTPUT, REFERENCES = 24, 51


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return QwenEditTransformer(**CONFIG).eval()


class Inputs:
    def __init__(self, batch: int = 2, text: int = 7):
        generator = torch.Generator().manual_seed(1)
        self.latents = torch.randn(batch, OUTPUT + REFERENCES, 64, generator=generator)
        self.text = torch.randn(batch, text, CONFIG["joint_attention_dim"], generator=generator)

    @torch.inference_mode()
    def velocity(self, model, sigma=0.7, references=None, text_mask=None, latents=None):
        forward = Forward(resolve("pytorch", CPU, torch.float32, 32).attend, REFERENCE)
        return denoise(
            model,
            self.latents if latents is None else latents,
            torch.full((len(self.text),), sigma),
            self.text,
            GRIDS,
            forward,
            axes_dims=CONFIG["axes_dims_rope"],
            zero_cond_t=True,
            text_mask=text_mask,
            references=references,
        )


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_leaving_the_references_in_a_cache_changes_no_bit(model):
    inputs, cache = Inputs(), ReferenceCache()
    assert torch.equal(inputs.velocity(model, references=cache), inputs.velocity(model))
    assert cache.complete


@pytest.mark.parametrize("masked", [False, True])
def test_the_same_inputs_again_give_the_same_result_from_the_cache(model, masked):
    inputs, cache = Inputs(), ReferenceCache()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    mask = mask if masked else None
    first = inputs.velocity(model, references=cache, text_mask=mask)
    again = inputs.velocity(model, references=cache, text_mask=mask)
    assert relative(again, first) < 1e-5


def test_only_keys_and_values_of_the_references_are_old(model):
    """What it has to compute: all as it is, but for the references, which are those of the earlier noise and timestep."""
    inputs, cache = Inputs(), ReferenceCache()
    inputs.velocity(model, 0.9, cache)
    later = inputs.latents.clone()
    later[:, :OUTPUT] *= 0.8
    reused = inputs.velocity(model, 0.5, cache, latents=later)
    exact = inputs.velocity(model, 0.5, latents=later)
    assert 1e-5 < relative(reused, exact) < 0.01
    other = later.clone()
    other[:, OUTPUT:] = torch.randn(other[:, OUTPUT:].shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(inputs.velocity(model, 0.5, cache, latents=other), reused)  # the references are not looked at


def test_a_forward_that_stopped_half_way_leaves_nothing_to_take(model):
    inputs, cache = Inputs(), ReferenceCache()
    cache.keep(torch.zeros(2, REFERENCES, 2, 4, 32), blocks=3)
    assert not cache.complete
    assert torch.equal(inputs.velocity(model, references=cache), inputs.velocity(model))
    assert len(cache.blocks) == 3


def test_without_references_there_is_nothing_to_keep(model):
    inputs, cache = Inputs(), ReferenceCache()
    with torch.inference_mode():
        forward = Forward(resolve("pytorch", CPU, torch.float32, 32).attend, REFERENCE)
        for _ in range(2):
            denoise(
                model, inputs.latents[:, :OUTPUT], torch.full((2,), 0.5), inputs.text, GRIDS[:1], forward,
                axes_dims=CONFIG["axes_dims_rope"], zero_cond_t=True, references=cache,
            )  # fmt: skip
    assert not cache.blocks


def test_it_is_made_anew_when_the_noise_has_fallen_far_enough(model):
    inputs, cache = Inputs(), ReferenceCache()
    made = []
    for sigma in (0.9, 0.85, 0.79, 0.7):
        cache.renew(sigma, 0.1)
        made.append(not cache.complete)
        inputs.velocity(model, sigma, cache)
    assert made == [True, False, True, False]


def test_the_size_is_known_before(model):
    inputs, cache = Inputs(), ReferenceCache()
    inputs.velocity(model, references=cache)
    assert sum(block.nbytes for block in cache.blocks) == cached_bytes(3, 128, 2, REFERENCES, torch.float32)
    assert sum(block.untyped_storage().nbytes() for block in cache.blocks) == cached_bytes(
        3, 128, 2, REFERENCES, torch.float32
    )
