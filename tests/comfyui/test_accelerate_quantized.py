"""Qwen Edit LoRA Switch behind QwenEditAccelerate, over quantized weights that ComfyUI's own loader has read.

The oracle is ComfyUI's LoRA loader on a file with what the quantized weights stand for, in fp32.
"""

import comfy_kitchen.tensor as kitchen
import pytest
import torch
from array_client import ArrayClient
from safetensors.torch import save_file
from stored_files import E4M3, LAYOUTS, VARIANTS, in_block, random_state, scaled, write_state
from test_accelerate import SWITCHED, TEXT_WIDTH, Samplings, rms, texts

pytestmark = [pytest.mark.server, pytest.mark.slow]

CONFIG = dict(num_layers=2, attention_head_dim=128, num_attention_heads=2, joint_attention_dim=TEXT_WIDTH)
LORA = "quantized lora.safetensors"
TARGETS = ("attn.to_q", "attn.to_out.0", "img_mlp.net.2", "img_mod.1", "txt_mod.1")


def _fp8(weight: torch.Tensor) -> torch.Tensor:
    values, scale = scaled(weight, E4M3)
    return values.float() * scale


def _int8_convrot(weight: torch.Tensor) -> torch.Tensor:
    _, layout, options, _ = LAYOUTS["int8_convrot"]
    return kitchen.QuantizedTensor.from_float(weight, layout, **options).dequantize().float()


# What the weights stand for, and how far the result may be from the oracle: for int8, activations are rounded to 8 bits.
KINDS = {"fp8 scaled": (_fp8, 1e-5), "int8_convrot": (_int8_convrot, 0.004)}


@pytest.fixture(scope="module", autouse=True)
def files(models):
    state = random_state(CONFIG)
    for kind, (stands_for, _) in KINDS.items():
        write_state(models / "diffusion_models" / f"{kind}.safetensors", kind, VARIANTS[kind](state))
        floats = {name: stands_for(t) if in_block(name, t) else t.float() for name, t in state.items()}
        write_state(models / "diffusion_models" / f"{kind} in floats.safetensors", "", floats)
    generator, lora = torch.Generator().manual_seed(1), {}
    for block in range(CONFIG["num_layers"]):
        for target in TARGETS:
            layer = f"transformer_blocks.{block}.{target}"
            rows, columns = state[f"{layer}.weight"].shape
            for part, shape in (("down", (4, columns)), ("up", (rows, 4))):
                lora[f"diffusion_model.{layer}.lora_{part}.weight"] = torch.randn(shape, generator=generator) * 0.15
    save_file(lora, models / "loras" / LORA)


@pytest.fixture(scope="module")
def sampled(server) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    with ArrayClient(server.url) as client:
        for kind in KINDS:
            made = Samplings(f"{kind}.safetensors")
            native = dict(lora_name=LORA, strength_model=1.0)
            made.add("floats", "UNETLoader", unet_name=f"{kind} in floats.safetensors", weight_dtype="default")
            made.sample("plain", ["floats", 0])
            made.sample("oracle", made.add("floats lora", "LoraLoaderModelOnly", model=["floats", 0], **native))
            made.sample("native", made.add("native lora", "LoraLoaderModelOnly", model=["unet", 0], **native))
            switch = made.add("switch", "QwenEditLoraSwitch", model=["accelerate", 0], **SWITCHED | {"lora_1": LORA})
            made.sample("switched", switch)
            made.sample("off", ["accelerate", 0])
            found[kind] = made.run(client, server)
        assert texts(client) == []
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_switch_over_quantized_weights_adds_what_the_lora_is(sampled, kind):
    results, (_, most) = sampled[kind], KINDS[kind]
    effect = rms(results["plain"], results["oracle"])
    assert rms(results["off"], results["plain"]) < most
    assert rms(results["switched"], results["oracle"]) < most
    assert effect > 10 * most


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_native_lora_loader_but_for_its_rounding(sampled, kind):
    """Which rounds each sum to the weight's format once more, so that the switch is nearer to the LoRA itself."""
    results = sampled[kind]
    effect = rms(results["plain"], results["oracle"])
    assert rms(results["switched"], results["native"]) < 0.08 * effect
    assert rms(results["switched"], results["oracle"]) < rms(results["native"], results["oracle"])
