"""ComfyUI's own LoRA patches on quantized weights: the change is the LoRA's, and unpatching restores every bit."""

import json

import pytest
from comfy_host import REPO
from comfy_process import run_in_comfyui

from qwen_edit.quantize import FORMATS

pytestmark = pytest.mark.server

CODE = """
import json
import comfy.model_management
import comfy.sd
import comfy.utils
from pack.nodes.host.model import make_model
from pack.qwen_edit.attention import resolve
from pack.qwen_edit.checkpoints import transformer_from_folder
from pack.qwen_edit.kernels import REFERENCE
from pack.qwen_edit.precision import Precision
from pack.qwen_edit.quantize import QuantizedTensor
from server import PromptServer
from types import SimpleNamespace

# what a patcher asks before it drops weights: whether a prompt runs
PromptServer.instance = SimpleNamespace(prompt_queue=SimpleNamespace(currently_running=True))
cpu, fp32 = torch.device("cpu"), torch.float32
source = transformer_from_folder(Path(DEMO))
lora = comfy.utils.load_torch_file(str(Path(DEMO) / "loras" / "qwen_edit_demo_pencil_sketch.safetensors"))
generator = torch.Generator().manual_seed(1)
x, reference = (torch.randn(1, 16, 1, 16, 16, generator=generator) for _ in range(2))
text = torch.randn(1, 9, 128, generator=generator)


def velocity(patcher):
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    return patcher.model.diffusion_model(x, torch.tensor([0.6]), text, ref_latents=[reference])


def bits(patcher):
    found = {}
    for name, parameter in patcher.model.diffusion_model.named_parameters():
        quantized = isinstance(parameter, QuantizedTensor)
        parts = (parameter._qdata, parameter._params.scale) if quantized else (parameter,)
        found[name] = [part.detach().clone().view(torch.uint8) for part in parts]
    return found


result = {}
with torch.inference_mode():
    for form in json.loads(FORMS):
        precision = Precision(form or "fp32", fp32, form, "")
        patcher = make_model(source, precision, None, resolve("pytorch", cpu, fp32, 32), REFERENCE)
        before, stored = velocity(patcher), bits(patcher)
        patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
        change = velocity(patched) - before
        name = "transformer_blocks.2.img_mlp.net.0.proj.weight"
        edited = isinstance(patched.model.diffusion_model.get_parameter(name), QuantizedTensor)
        moved = not torch.equal(bits(patched)[name][0], stored[name][0])
        after = velocity(patcher)
        restored = all(torch.equal(a, b) for n, part in bits(patcher).items() for a, b in zip(part, stored[n], strict=True))
        if form is None:
            wanted = change
        cosine = torch.cosine_similarity(change.flatten(), wanted.flatten(), 0).item()
        ratio = (change.norm() / wanted.norm()).item()
        result[str(form)] = [edited, moved, restored, torch.equal(after, before), cosine, ratio]
print("RESULT", json.dumps(result))
"""


@pytest.fixture(scope="module")
def patched(host):
    constants = f"DEMO, FORMS = {str(REPO / 'demo_model')!r}, {json.dumps(json.dumps([None, *FORMATS]))}\n"
    return json.loads(run_in_comfyui(host, constants + CODE).split("RESULT", 1)[1])


@pytest.mark.parametrize(
    ("form", "least", "off"), [("fp8", 0.97, 0.04), ("int8", 0.99, 0.01), ("w4a4", 0.75, 0.3), ("w4a8", 0.75, 0.3)]
)
def test_a_native_lora_patch_on_quantized_weights(patched, form, least, off):
    """Against the same LoRA on float weights. Requantizing to 4 bit swallows part of it (measured: direction 0.83,
    strength 0.79); the addends of QwenEditLoraSwitch do not touch the weights and lose nothing."""
    quantized, moved, _, _, cosine, ratio = patched[form]
    assert quantized
    assert moved
    assert cosine > least
    assert abs(ratio - 1) < off


@pytest.mark.parametrize("form", FORMATS)
def test_unpatching_restores_every_bit(patched, form):
    _, _, restored, same_velocity, _, _ = patched[form]
    assert restored
    assert same_velocity
