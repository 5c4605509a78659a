"""One block of the released width (24 heads of 128, text of 3584) from files of every format that ComfyUI's loader knows,
through that loader and through ours, on the CPU in fp32. Each file holds several, because reading it twice takes longest.

What each format alone does is tested on small transformers (`test_stored_weights.py`).
"""

import json

import pytest
from comfy_process import run_in_comfyui
from stored_files import State, in_block, in_fp8, in_layout, random_state, write_state
from test_stored_weights import CODE, FP8, INT8

pytestmark = [pytest.mark.server, pytest.mark.slow]

CONFIG = dict(num_layers=1, attention_head_dim=128, num_attention_heads=24, joint_attention_dim=3584)


def _of(*parts: str):
    return lambda name, tensor: in_block(name, tensor) and any(f".{part}." in name for part in parts)


def _floating_point(state: State) -> State:
    state = in_fp8(state, _of("attn", "img_mod", "txt_mod", "img_mlp"))
    return in_layout(in_layout(state, "nvfp4", _of("txt_mlp.net.2")), "mxfp8", _of("txt_mlp.net.0.proj"))


def _integers(state: State) -> State:
    state = in_layout(state, "int8_convrot", _of("attn", "img_mod", "txt_mod"))
    return in_layout(in_layout(state, "int8 rowwise", _of("img_mlp")), "w4a4", _of("txt_mlp"))


# How far the velocity may be from float products, as for small transformers.
FILES = {"fp8, nvfp4 and mxfp8": (_floating_point, FP8), "int8, with rotation and without, and w4a4": (_integers, INT8)}

COMPARE = """
import gc
comfy.model_detection.detect_unet_config = detect  # this width it knows
x, reference = (torch.randn(1, 16, 1, 4, 6, generator=generator) for _ in range(2))
text = torch.randn(1, 9, 3584, generator=generator)
with torch.inference_mode():
    native = comfy.sd.load_diffusion_model(PATH)
    make_float(native)
    exact = velocity(native)
    del native
    gc.collect()
    result = {"float": off(velocity(model_of(PATH, FLOAT)), exact)}
    gc.collect()
    stored = model_of(PATH)
    result["stored"] = off(velocity(stored), exact)
    result["kept"] = sum(isinstance(p, QuantizedTensor) for p in stored.model.diffusion_model.parameters())
print("RESULT", json.dumps(result))
"""


@pytest.fixture(scope="module")
def weights() -> State:
    return random_state(CONFIG)


@pytest.mark.parametrize("kind", FILES)
def test_a_block_of_the_released_width_is_what_comfyui_reads(host, weights, tmp_path, kind):
    quantize, most = FILES[kind]
    path = tmp_path / "block.safetensors"
    write_state(path, kind, quantize(weights))
    try:
        printed = run_in_comfyui(host, f"PATH = {str(path)!r}\n{CODE}{COMPARE}", 300)
    finally:
        path.unlink()
    found = json.loads(printed.split("RESULT", 1)[1])
    assert found["float"] < 1e-6
    assert found["stored"] < most
    assert found["kept"] == 14
