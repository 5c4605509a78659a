"""What the implementations of attention compute: each against the formula in float64, and the bounds of the error."""

import sys
import types

import pytest
import torch

from qwen_edit import attention
from qwen_edit.attention import BOUNDS, CHOICES, bound, joint_inputs, relative_error, resolve

CPU = torch.device("cpu")
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


def exact(q, k, v):
    """Attention by its formula in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2)


def difference(out, expected) -> float:
    return ((out.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["pytorch", "math"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_views_of_a_joint_buffer_are_read_as_they_are(name, dtype):
    q, k, v = joint_inputs(2, 77, 3, 32, CPU, dtype)
    assert not q.is_contiguous()
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    before = [x.clone() for x in (q, k, v)]
    out = resolve(name, CPU, dtype, 32).attend(q, k, v, None)
    assert out.dtype == dtype
    assert difference(out, exact(q, k, v)) < BOUNDS[dtype]
    assert out.flatten(2, 3).data_ptr() == out.data_ptr()  # a view: contiguous
    assert all(torch.equal(now, then) for now, then in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("name", ["pytorch", "math"])
def test_a_mask_hides_keys(name):
    q, k, v = joint_inputs(2, 20, 3, 32, CPU, torch.float32)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    mask[1, ..., 12:] = False
    out = resolve(name, CPU, torch.float32, 32).attend(q, k, v, mask)
    assert difference(out[0], exact(q[:1], k[:1], v[:1])[0]) < 1e-5
    assert difference(out[1], exact(q[1:], k[1:, :12], v[1:, :12])[0]) < 1e-5


def test_math_is_more_exact_than_bf16():
    q, k, v = joint_inputs(1, 300, 2, 128, CPU, torch.bfloat16)
    expected = exact(q, k, v)
    assert difference(attention._math(q.float(), k.float(), v.float()), expected) < 1e-5
    assert difference(attention._math(q, k, v), expected) < difference(attention._pytorch(q, k, v), expected)


def test_the_error_is_seen_wherever_it_is():
    """At many tokens too, where only some are looked at: a kernel that skips its last tile of 128 must show."""
    q, k, v = joint_inputs(1, 2000, 4, 32, CPU, torch.float32)
    out = attention._pytorch(q, k, v)
    assert relative_error(out, q, k, v) < 1e-5
    out[:, -128:] = 0
    assert relative_error(out, q, k, v) > 0.1


def eight_bit(q, k, v, smooth=True, fp8_values=False):
    """What SageAttention computes: int8 scores by blocks of 128 queries and 64 keys, values in fp16 or fp8."""

    def rounded(x, rows):
        parts = []
        for block in x.split(rows, dim=1):
            scale = block.abs().amax((1, 3), keepdim=True) / 127
            parts.append((block / scale).round() * scale)
        return torch.cat(parts, 1)

    q, k, v = (x.float() for x in (q, k, v))
    if smooth:
        k = k - k.mean(1, keepdim=True)
    scores = torch.einsum("blhd,bmhd->bhlm", rounded(q, 128), rounded(k, 64)) / q.shape[-1] ** 0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1).transpose(1, 2)[..., None]
    if fp8_values:
        scale = v.abs().amax(1, keepdim=True) / 448
        weights = (weights * 448).to(torch.float8_e4m3fn).float() / 448
        v = (v / scale).to(torch.float8_e4m3fn).float() * scale
    return (torch.einsum("bhlm,bmhd->blhd", weights, v) / total).bfloat16()


@pytest.mark.parametrize("tokens", [337, 2048])
def test_the_bounds_tell_16_bit_from_8_bit_and_8_bit_from_wrong(tokens):
    q, k, v = joint_inputs(1, tokens, 2, 128, CPU, torch.bfloat16)
    rounding = relative_error(attention._pytorch(q, k, v), q, k, v)
    good = [relative_error(eight_bit(q, k, v, fp8_values=fp8), q, k, v) for fp8 in (False, True)]
    careless = relative_error(eight_bit(q, k, v, smooth=False), q, k, v)
    limit = bound("flash", torch.bfloat16)
    assert rounding * 2 < limit < min(good) / 2
    assert max(good) < bound("sage", torch.bfloat16) < careless


# The packages' calling conventions


def imitate(monkeypatch, module: str, **functions):
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        imitation = types.ModuleType(".".join(parts[:end]))
        imitation.__path__ = []
        monkeypatch.setitem(sys.modules, imitation.__name__, imitation)
    for name, function in functions.items():
        setattr(sys.modules[module], name, function)


def takes_qkv(q, k, v):
    return attention._pytorch(q, k, v)


@pytest.mark.parametrize("returned", [lambda out: out, lambda out: (out, out.sum(-1))], ids=["output", "with lse"])
@pytest.mark.parametrize(("name", "module"), [("flash3", "flash_attn_interface"), ("flash4", "flash_attn.cute")])
def test_flash_3_and_4_return_an_output_or_a_pair(monkeypatch, name, module, returned):
    imitate(monkeypatch, module, flash_attn_func=lambda q, k, v: returned(takes_qkv(q, k, v)))
    q, k, v = joint_inputs(1, 30, 2, 32, CPU, torch.float32)
    assert difference(attention._LOADERS[name]()(q, k, v, None), exact(q, k, v)) < 1e-5


def test_flash_is_the_package_or_what_pytorch_has(monkeypatch):
    """The folder of flash-attn-4 alone makes ``import flash_attn`` succeed; it must not be taken for flash-attn."""
    q, k, v = joint_inputs(1, 30, 2, 32, CPU, torch.float32)
    imitate(monkeypatch, "flash_attn.cute", flash_attn_func=takes_qkv)
    monkeypatch.setattr(attention, "installed", lambda package: "4.0.0b36" if package == "flash-attn-4" else None)
    assert difference(attention._LOADERS["flash"]()(q, k, v, None), exact(q, k, v)) < 1e-5
    assert attention._maker("flash") == "the one inside torch"

    calls = []
    imitate(monkeypatch, "flash_attn", flash_attn_func=lambda q, k, v: calls.append("package") or takes_qkv(q, k, v))
    monkeypatch.setattr(attention, "installed", lambda package: "2.8.3")
    attention._LOADERS["flash"]()(q, k, v, None)
    assert calls == ["package"]
    assert attention._maker("flash") == "flash-attn 2.8.3"


def test_sage_may_write_into_its_keys(monkeypatch):
    def sageattn(q, k, v, tensor_layout, is_causal):
        assert (tensor_layout, is_causal) == ("NHD", False)
        k -= k.mean(1, keepdim=True)  # as version 1.0.6 does
        return takes_qkv(q, k, v)

    imitate(monkeypatch, "sageattention", sageattn=sageattn)
    q, k, v = joint_inputs(1, 30, 2, 64, CPU, torch.float32)
    before = k.clone()
    assert difference(attention._LOADERS["sage"]()(q, k, v, None), exact(q, k, v)) < 1e-5
    assert torch.equal(k, before)


# On a card


@needs_card
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("name", CHOICES[1:])
@torch.inference_mode()
def test_on_a_card_every_implementation_equals_float64(name, dtype):
    """Batches, lengths that fill no tile, and views of one buffer, which must come back untouched."""
    device = torch.device("cuda")
    choice = resolve(name, device, dtype, 128)
    if choice.fell_back:
        pytest.skip(choice.why)
    for batch, tokens in ((1, 128), (2, 1000), (1, 2328)):
        q, k, v = joint_inputs(batch, tokens, 24, 128, device, dtype)
        before = [x.clone() for x in (q, k, v)]
        out = choice.attend(q, k, v, None)
        assert out.dtype == dtype
        assert difference(out, exact(q, k, v)) < bound(name, dtype), (batch, tokens)
        assert out.is_contiguous()
        assert all(torch.equal(now, then) for now, then in zip((q, k, v), before, strict=True))


@needs_card
@pytest.mark.parametrize("name", [c for c in CHOICES[1:] if c not in ("math", "sage", "pytorch")])
@torch.inference_mode()
def test_on_a_card_no_copy_of_the_inputs_is_made(name):
    device, tokens = torch.device("cuda"), 4096
    choice = resolve(name, device, torch.bfloat16, 128)
    if choice.fell_back:
        pytest.skip(choice.why)
    q, k, v = joint_inputs(1, tokens, 24, 128, device, torch.bfloat16)
    choice.attend(q, k, v, None)  # workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = choice.attend(q, k, v, None)
    torch.cuda.synchronize()
    size = out.numel() * out.element_size()
    assert torch.cuda.max_memory_allocated() - before < 1.5 * size  # the result and its row statistics
