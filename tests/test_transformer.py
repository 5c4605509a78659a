"""The engine's forward against diffusers' own, with random weights of a small configuration."""

from dataclasses import fields, replace

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

from qwen_edit.attention import resolve
from qwen_edit.kernels import FusedKernels
from qwen_edit.linear import pack
from qwen_edit.modulation import ModulationCache
from qwen_edit.quantize import quantize_weight
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
    [
        ((4, 6),),
        ((2, 3), (4, 4)),
        ((4, 6), (4, 6)),
        ((5, 3), (7, 9)),
        ((4, 4), (2, 6), (8, 3)),
        ((3, 5), (6, 4), (1, 7), (5, 9)),
    ],
    ids=[
        "no reference",
        "fewer tokens than text",
        "same grid",
        "odd, larger reference",
        "two references",
        "three references",
    ],
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
        "transformer_blocks.0.attn.to_out.0",
        "transformer_blocks.1.attn.to_add_out",
        "transformer_blocks.0.img_mlp.net.0.proj",
        "transformer_blocks.1.txt_mlp.net.2",
        "norm_out.linear",
        "proj_out",
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


ODD = ((3, 5), (5, 7), (2, 1))  # no two alike; the first reference larger than the output


def plain_forward() -> Forward:
    return Forward(resolve("pytorch", torch.device("cpu"), torch.float32, 32).attend)


def quantized(model, form: str, packed: bool):
    for block in model.transformer_blocks:
        attn = block.attn
        for name, linear in block.named_modules():
            if isinstance(linear, torch.nn.Linear) and "_mod." not in name:
                linear.weight = torch.nn.Parameter(quantize_weight(linear.weight.data, form), requires_grad=False)
        if packed:
            pack([attn.to_q, attn.to_k, attn.to_v])
            pack([attn.add_q_proj, attn.add_k_proj, attn.add_v_proj])
    return model


def difference(got, expected) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("adapted", [False, True])
@torch.no_grad()
def test_packed_weights_compute_the_same(batch, adapted):
    """One item's product is written into the joint buffer, several items' are copied there."""
    _, ours = models(True)
    forward = plain_forward()
    if adapted:
        linears = [ours.transformer_blocks[1].attn.to_k, ours.transformer_blocks[0].attn.add_v_proj]
        low_rank = LowRank(torch.randn(3, 128) * 0.3, torch.randn(128, 3) * 0.3, 0.5)
        forward = replace(forward, adapters={linear: [low_rank] for linear in linears})
    latents, text, timestep = inputs(ODD, batch)
    apart = run(ours, latents, timestep, text, ODD, forward)
    for block in ours.transformer_blocks:
        pack([block.attn.to_q, block.attn.to_k, block.attn.to_v])
        pack([block.attn.add_q_proj, block.attn.add_k_proj, block.attn.add_v_proj])
    assert len(forward.operands(block.attn.to_q, block.attn.to_k, block.attn.to_v)) == 1
    assert_equal(run(ours, latents, timestep, text, ODD, forward), apart)


@pytest.mark.parametrize(("rows", "form"), [(1, None), (7, None), (1000, None), (7, "int8")])
@torch.no_grad()
def test_mlps_in_parts_compute_the_same(rows, form):
    _, ours = models(True)
    if form is not None:
        quantized(ours, form, packed=True)
    hidden_rows = []
    ours.transformer_blocks[0].img_mlp.net[2].register_forward_pre_hook(lambda m, x: hidden_rows.append(len(x[0])))
    low_rank = LowRank(torch.randn(3, 128) * 0.3, torch.randn(512, 3) * 0.3, 0.5)
    adapters = {ours.transformer_blocks[1].img_mlp.net[0].proj: [low_rank]}
    latents, text, timestep = inputs(ODD, batch=2)
    forward = replace(plain_forward(), adapters=adapters)
    whole = run(ours, latents, timestep, text, ODD, forward)
    parts = run(ours, latents, timestep, text, ODD, replace(forward, mlp_rows=rows))
    assert difference(parts, whole) < (1e-6 if form is None else 0.01)  # int8: rounding at halves
    tokens = 2 * (15 + 35 + 2)
    assert hidden_rows == [tokens] + [min(rows, tokens - first) for first in range(0, tokens, rows)]


@pytest.mark.parametrize(
    ("form", "packed"), [("fp8", True), ("fp8", False), ("int8", True), ("w4a4", False), ("w4a8", False)]
)
@torch.no_grad()
def test_a_quantized_forward_is_near(form, packed):
    """With weights far larger than a trained model's, so that errors show; the least says that it was quantized."""
    _, ours = models(True)
    latents, text, timestep = inputs(ODD, batch=2)
    exact = run(ours, latents, timestep, text, ODD, plain_forward())
    near = run(quantized(ours, form, packed), latents, timestep, text, ODD, plain_forward())
    least, most = {"fp8": (0.03, 0.12), "int8": (0.01, 0.05), "w4a4": (0.15, 0.5), "w4a8": (0.06, 0.3)}[form]
    assert least < difference(near, exact) < most


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of a sigmoid that is then 0
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels run on the card")
@pytest.mark.parametrize("form", [None, "int8"])
@torch.no_grad()
def test_a_forward_with_triton_kernels_equals_one_without(form):
    """In Triton's interpreter: that the forward gives the kernels what they expect."""
    fused = pytest.importorskip("qwen_edit.kernels.fused")
    functions = (getattr(fused, f.name) for f in fields(FusedKernels) if f.name in vars(fused))
    kernels = FusedKernels("triton", "", *functions)
    _, ours = models(True)
    if form is not None:
        quantized(ours, form, packed=True)
    grids = ((2, 3), (3, 1))
    latents, text, timestep = inputs(grids, batch=2)
    plain = run(ours, latents, timestep, text, grids, plain_forward())
    got = run(ours, latents, timestep, text, grids, replace(plain_forward(), kernels=kernels))
    assert difference(got, plain) < (1e-5 if form is None else 0.01)  # int8: rounding at halves


@torch.no_grad()
def test_kept_modulation_changes_nothing():
    theirs, ours = models(True)
    ours.modulation = ModulationCache()
    latents, text, _ = inputs(((4, 4), (4, 4)), batch=2)
    for timestep in ([0.5, 0.25], [0.25, 0.25], [0.5, 0.75], [0.5, 0.25]):
        arguments = dict(
            hidden_states=latents,
            encoder_hidden_states=text,
            timestep=torch.tensor(timestep),
            img_shapes=[[(1, 4, 4)] * 2] * 2,
            return_dict=False,
        )
        assert_equal(ours(**arguments)[0], theirs(**arguments)[0][:, :16])


def test_positions_differ_between_the_conventions_only_where_they_must():
    """Even grids, no reference larger than the output: equal. Odd grids or a larger reference: not."""
    device, axes = torch.device("cpu"), (8, 12, 12)
    for grids, equal in [(((4, 6), (4, 6)), True), (((5, 6),), False), (((4, 4), (8, 8)), False)]:
        first, second = (rope_table(grids, 5, axes, p, device) for p in ("diffusers", "comfyui"))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) is equal, grids
