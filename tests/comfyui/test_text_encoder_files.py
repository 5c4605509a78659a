"""The text encoder as a single file in scaled fp8, as users have it, through ComfyUI's own loader."""

import json

import pytest
import torch
from comfy_process import run_in_comfyui
from safetensors.torch import save_file

pytestmark = [pytest.mark.server, pytest.mark.slow]

LAYER = "model.layers.0.self_attn.k_proj."
CODE = """
import json
from types import SimpleNamespace
from server import PromptServer
PromptServer.instance = SimpleNamespace(prompt_queue=SimpleNamespace(currently_running=True))
from pack.nodes.host import loading
from pack.nodes.host.request import LoadRequest

with torch.inference_mode():
    clip = loading._single_clip(LoadRequest("demo", text_encoder=FILE.name), FILE)
    weight = clip.cond_stage_model.qwen25_7b.transformer.model.layers[0].self_attn.k_proj.weight
    stored = str(getattr(weight, "_qdata", weight).dtype)
    values = weight.dequantize() if hasattr(weight, "_qdata") else weight
    print("RESULT", json.dumps([stored, values[:2, :4].float().tolist()]))
"""


def test_scaled_fp8_is_loaded_as_it_is_stored(host, tmp_path):
    """Enough of the encoder for ComfyUI to know it by; it leaves the rest of the 7 B as it is allocated, untouched."""
    numbers = torch.tensor([[1.0, -2.0, 0.5, 4.0], [8.0, 0.25, -1.0, 3.0]])
    weight = torch.zeros(512, 3584)
    weight[:2, :4] = numbers
    path = tmp_path / "qwen_2.5_vl_7b_fp8_scaled.safetensors"
    state = {
        "visual.merger.ln_q.weight": torch.ones(1280),
        LAYER + "bias": torch.zeros(512, dtype=torch.bfloat16),
        LAYER + "weight": weight.to(torch.float8_e4m3fn),
        LAYER + "scale_weight": torch.tensor(0.5),
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    save_file(state, path)
    printed = run_in_comfyui(host, f"FILE = Path({str(path)!r})\n{CODE}", timeout_s=300)
    stored, values = json.loads(printed.split("RESULT ", 1)[1])
    assert stored == "torch.float8_e4m3fn"
    assert torch.equal(torch.tensor(values), numbers * 0.5)
