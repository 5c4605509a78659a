"""Our transformer under ComfyUI's calling convention against ComfyUI's own: same random weights, same inputs."""

import json

import pytest
from comfy_process import run_in_comfyui

pytestmark = pytest.mark.server

TOLERANCE = 1e-5
GRIDS = {
    "even": [(8, 12)],
    "odd tokens": [(10, 14)],
    "odd latents": [(9, 13)],
    "one reference": [(8, 12), (8, 12)],
    "two references": [(8, 12), (8, 12), (12, 8)],
    "odd reference": [(10, 14), (9, 7)],
    "larger references": [(8, 8), (20, 16), (14, 30)],
}

CODE = """
import json
import comfy.ops
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from pack.nodes.host.model import HostTransformer
from pack.qwen_edit.attention import resolve
from pack.qwen_edit.fused_lora import FusedLoras
from pack.qwen_edit.kernels import REFERENCE
from pack.qwen_edit.modulation import ModulationCache
from pack.qwen_edit.streaming import BlockStream

torch.manual_seed(0)
shape = dict(num_layers=3, attention_head_dim=32, num_attention_heads=4, joint_attention_dim=48)
ours = HostTransformer(**shape, axes_dims_rope=(8, 12, 12), zero_cond_t=True).eval()
for parameter in ours.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
ours.attention = resolve("pytorch", torch.device("cpu"), torch.float32, 32)
ours.kernels, ours.modulation, ours.fused = REFERENCE, ModulationCache(), FusedLoras(ours)
ours.stream = BlockStream(ours.transformer_blocks)
native = QwenImageTransformer2DModel(
    **shape, axes_dims_rope=(8, 12, 12), default_ref_method="index_timestep_zero", dtype=torch.float32, operations=comfy.ops.disable_weight_init
).eval()
names = native.load_state_dict(ours.state_dict(), strict=False)
assert not names.unexpected_keys and names.missing_keys in ([], ["__index_timestep_zero__"]), names


from types import SimpleNamespace
import comfy.patcher_extension
from pack.nodes.host.accelerate import _KEPT, AcceleratedForward

wrapper = AcceleratedForward(ours.attention, REFERENCE, SimpleNamespace(model=SimpleNamespace(current_weight_patches_uuid=None, current_patcher=None, diffusion_model=native)))
ours_over_native = dict(wrappers={comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL: {"k": [wrapper]}})


def run(model, grids, batch, method, mask, transformer_options={}):
    g = torch.Generator().manual_seed(1)
    x, *references = [torch.randn(batch, 16, 1, h, w, generator=g) for h, w in grids]
    timestep, text = torch.rand(batch, generator=g), torch.randn(batch, 9, 48, generator=g)
    options = {} if method is None else dict(ref_latents_method=method)
    if mask:
        options["attention_mask"] = torch.tensor([[1] * 6 + [0] * 3] * batch)
    if mask == "additive":
        options["attention_mask"] = (options["attention_mask"] - 1) * torch.finfo(torch.float32).max
    return model(x, timestep, text, ref_latents=references or None, transformer_options=dict(transformer_options), **options)


with torch.inference_mode():
    result = {}
    for name, grids in json.loads(GRIDS).items():
        for method in (None, "index", "index_timestep_zero"):
            for batch, mask in ((1, False), (2, False), (2, True), (2, "additive")):
                theirs, mine = (run(model, grids, batch, method, mask) for model in (native, ours))
                over_native = run(native, grids, batch, method, mask, ours_over_native)
                assert theirs.shape == mine.shape == over_native.shape
                scale = theirs.abs().max().item()
                for who, got in (("loader", mine), ("accelerate", over_native)):
                    case = f"{name}, {method}, batch {batch}, mask {mask}, {who}"
                    result[case] = (theirs - got).abs().max().item() / scale
    one = run(ours, [(8, 12), (8, 12)], 1, "index", False)
    other = run(ours, [(8, 12), (8, 12)], 1, "index_timestep_zero", False)
    moved = (one - other).abs().max().item() / one.abs().max().item()


class PackedTensor(torch.Tensor):
    # as GGUF packs keep a weight: two 4-bit numbers in a byte, and the shape of what they stand for
    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 7
        levels = (weight / scale).round() + 8
        packed = (levels[:, ::2] + 16 * levels[:, 1::2]).to(torch.uint8).as_subclass(cls)
        packed.scale, packed.tensor_shape = scale, weight.shape
        return packed

    @property
    def shape(self):
        return self.tensor_shape

    def detach(self):
        return self

    def dequantized(self):
        plain = self.as_subclass(torch.Tensor)
        levels = torch.stack([plain % 16, plain // 16], -1).flatten(1).float() - 8
        return levels * self.scale


class PackedLinear(comfy.ops.manual_cast.Linear):
    called = 0

    def forward_comfy_cast_weights(self, x):
        PackedLinear.called += 1
        return torch.nn.functional.linear(x, self.weight.dequantized().to(x.dtype), self.bias)


linears = [module for module in native.modules() if isinstance(module, torch.nn.Linear)]
with torch.inference_mode():
    before = run(native, [(8, 12), (8, 12)], 1, None, False)
    for linear in linears:
        linear.__class__ = PackedLinear
        linear.weight = torch.nn.Parameter(PackedTensor.of(linear.weight.detach()), requires_grad=False)
    _KEPT.clear()  # made of the weights before
    assert type(linears[0].weight) is PackedTensor
    found = {}
    for method in (None, "index", "index_timestep_zero"):
        PackedLinear.called = 0
        theirs = run(native, [(8, 12), (8, 12)], 1, method, False)
        counts = [PackedLinear.called]
        mine = run(native, [(8, 12), (8, 12)], 1, method, False, ours_over_native)
        counts.append(PackedLinear.called - counts[0])
        found[str(method)] = [(theirs - mine).abs().max().item() / theirs.abs().max().item(), torch.equal(theirs, mine), *counts]
    rounded = (run(native, [(8, 12), (8, 12)], 1, None, False) - before).abs().max().item()
print("RESULT", json.dumps([result, moved, found, len(linears), rounded]))
"""


@pytest.fixture(scope="module")
def differences(host):
    printed = run_in_comfyui(host, f"GRIDS = {json.dumps(json.dumps(GRIDS))}\n{CODE}")
    return json.loads(printed.split("RESULT", 1)[1])


@pytest.mark.parametrize("grids", GRIDS)
def test_forward_equals_the_native_one(differences, grids):
    compared = {name: error for name, error in differences[0].items() if name.startswith(f"{grids},")}
    assert len(compared) == 24
    assert max(compared.values()) < TOLERANCE, compared


def test_the_reference_methods_differ(differences):
    assert differences[1] > 100 * TOLERANCE


def test_weights_of_another_packs_kind_are_applied_by_their_own_modules(differences):
    """QwenEditAccelerate over a GGUF loader's MODEL: a tensor class of its own, which its linears alone can read."""
    _, _, packed, linears, rounded = differences
    assert rounded > 100 * TOLERANCE
    for error, equal, native_calls, _ in packed.values():
        assert error < TOLERANCE
        assert not equal, "equal to the last bit: our forward has not run"
        assert native_calls == linears
    # all but those of the last block's text, which nothing reads; later the modulation is there already
    assert packed["None"][3] == linears - 3
