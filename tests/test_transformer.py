"""The engine's forward against diffusers' own, with random weights of a small configuration."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

from qwen_edit.attention import resolve
from qwen_edit.rope import rope_table
from qwen_edit.transformer import Forward, LowRank, QwenEditTransformer, denoise

CONFIG = dict(
    num_layers=3,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=48,
    axes_dims_rope=(8, 12, 12),
)
TEXT_LENGTH = 9


def models(zero_cond_t: bool):
    torch.manual_seed(0)
    theirs = QwenImageTransformer2DModel(**CONFIG, zero_cond_t=zero_cond_t).eval()
    for parameter in theirs.parameters():  # biases too: what starts at zero can't show a mistake
        torch.nn.init.normal_(parameter, std=0.2)
    ours = QwenEditTransformer(**CONFIG, zero_cond_t=zero_cond_t).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_equal(got, expected):
    """The largest deviation, relative to the largest number, stays within float rounding."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def run(model, latents, timestep, text, grids, forward):
    return denoise(model, latents, timestep, text, grids, forward, axes_dims=(8, 12, 12), zero_cond_t=True)


def inputs(grids, batch=1):
    generator = torch.Generator().manual_seed(1)
    tokens = sum(rows * columns for rows, columns in grids)
    latents = torch.randn(batch, tokens, 64, generator=generator)
    text = torch.randn(batch, TEXT_LENGTH, 48, generator=generator)
    return latents, text, torch.rand(batch, generator=generator)


@pytest.mark.parametrize("zero_cond_t", [True, False])
@pytest.mark.parametrize(
    "grids",
    [((4, 6),), ((4, 6), (4, 6)), ((5, 3), (7, 9)), ((4, 4), (2, 6), (8, 3))],
    ids=["no reference", "same grid", "odd, larger reference", "two references"],
)
@torch.no_grad()
def test_forward_equals_diffusers(grids, zero_cond_t):
    theirs, ours = models(zero_cond_t)
    latents, text, timestep = inputs(grids)
    arguments = dict(
        hidden_states=latents,
        encoder_hidden_states=text,
        timestep=timestep,
        img_shapes=[[(1, rows, columns) for rows, columns in grids]],
        return_dict=False,
    )
    output_tokens = grids[0][0] * grids[0][1]
    expected = theirs(**arguments)[0][:, :output_tokens]
    got = ours(**arguments)[0]
    assert_equal(got, expected)


@torch.no_grad()
def test_a_text_mask_hides_its_tokens():
    theirs, ours = models(True)
    latents, text, timestep = inputs(((4, 4), (4, 4)), batch=2)
    mask = torch.ones(2, TEXT_LENGTH, dtype=torch.bool)
    mask[1, 5:] = False
    arguments = dict(
        hidden_states=latents,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        timestep=timestep,
        img_shapes=[[(1, 4, 4)] * 2] * 2,
        return_dict=False,
    )
    assert_equal(ours(**arguments)[0], theirs(**arguments)[0][:, :16])


@torch.no_grad()
def test_an_item_does_not_depend_on_its_batch():
    _, ours = models(True)
    latents, text, timestep = inputs(((4, 4), (4, 4)), batch=3)
    forward = Forward(resolve("pytorch", torch.device("cpu"), torch.float32, 32).attend)
    together = run(ours, latents, timestep, text, ((4, 4), (4, 4)), forward)
    for i in range(3):
        alone = run(ours, latents[i : i + 1], timestep[i : i + 1], text[i : i + 1], ((4, 4), (4, 4)), forward)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_adapter_equals_the_merged_weight():
    _, ours = models(True)
    latents, text, timestep = inputs(((4, 4), (4, 4)))
    forward = Forward(resolve("pytorch", torch.device("cpu"), torch.float32, 32).attend)
    names = [
        "img_in",
        "transformer_blocks.0.img_mod.1",
        "transformer_blocks.1.attn.to_q",
        "transformer_blocks.2.txt_mlp.net.2",
    ]
    adapters = {}
    for name in names:
        linear = ours.get_submodule(name)
        a, b = torch.randn(3, linear.in_features) * 0.3, torch.randn(linear.out_features, 3) * 0.3
        adapters[linear] = [LowRank(a, b, 0.5)]
    plain = run(ours, latents, timestep, text, ((4, 4), (4, 4)), forward)
    added = run(ours, latents, timestep, text, ((4, 4), (4, 4)), replace(forward, adapters=adapters))
    for linear, (low_rank,) in adapters.items():
        linear.weight += low_rank.scale * low_rank.b @ low_rank.a
    merged = run(ours, latents, timestep, text, ((4, 4), (4, 4)), forward)
    torch.testing.assert_close(added, merged, rtol=1e-4, atol=1e-4)
    assert (added - plain).abs().max() > 1e-2


def test_positions_differ_between_the_conventions_only_where_they_must():
    """Even grids, no reference larger than the output: equal. Odd grids or a larger reference: not."""
    device, axes = torch.device("cpu"), (8, 12, 12)
    for grids, equal in [(((4, 6), (4, 6)), True), (((5, 6),), False), (((4, 4), (8, 8)), False)]:
        first, second = (rope_table(grids, 5, axes, p, device) for p in ("diffusers", "comfyui"))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) is equal, grids
