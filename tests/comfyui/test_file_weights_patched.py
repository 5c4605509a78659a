"""The modulation that is read from its file for each schedule, while ComfyUI's LoRAs are in its weights."""

import json

import pytest
from comfy_host import REPO
from comfy_process import run_in_comfyui

pytestmark = pytest.mark.server

CODE = """
import json
from types import SimpleNamespace
import comfy.hooks
import comfy.model_management
import comfy.sd
from pack.nodes.host.model import make_model
from pack.qwen_edit.attention import resolve
from pack.qwen_edit.checkpoints import read_headers, transformer_from_folder
from pack.qwen_edit.file_weights import FileWeights
from pack.qwen_edit.filling import places
from pack.qwen_edit.kernels import REFERENCE
from pack.qwen_edit.linear import RESIDENT
from pack.qwen_edit.precision import Precision
from pack.qwen_edit.quantize import StaysInRam
from server import PromptServer

PromptServer.instance = SimpleNamespace(prompt_queue=SimpleNamespace(currently_running=True))
cpu, fp32 = torch.device("cpu"), torch.float32
source = transformer_from_folder(Path(DEMO))
names = [f"transformer_blocks.{block}.{stream}_mod.1" for block in range(5) for stream in ("img", "txt")]
generator = torch.Generator().manual_seed(1)
x, reference = (torch.randn(1, 16, 1, 16, 16, generator=generator) for _ in range(2))
text = torch.randn(1, 9, 128, generator=generator)


def on_the_modulation(transformer):
    state = {}
    for name in names:
        linear = transformer.get_submodule(name)
        for part, shape in (("lora_A", (2, linear.in_features)), ("lora_B", (linear.out_features, 2))):
            state[f"diffusion_model.{name}.{part}.weight"] = torch.randn(shape, generator=generator) * 0.1
    return state


def velocity(patcher, weights):
    transformer = patcher.model.diffusion_model
    transformer.modulation.clear()
    transformer.weights = weights
    return transformer(x, torch.tensor([0.6]), text, ref_latents=[reference])


with torch.inference_mode():
    patcher = make_model(source, Precision("fp32", fp32, None, ""), None, resolve("pytorch", cpu, fp32, 32), REFERENCE)
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    transformer = patcher.model.diffusion_model
    in_file, (wanted, _) = FileWeights(), places(source, read_headers(source))
    for name, module in transformer.named_modules():
        if isinstance(module, StaysInRam):  # as reading onto a card does
            in_file.add(module, module.weight, module.weight, wanted[f"{name}.weight"])
    lora = on_the_modulation(transformer)
    plain = velocity(patcher, in_file)
    result = {"plain": torch.equal(plain, velocity(patcher, RESIDENT))}

    patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    result["on the MODEL"] = torch.equal(changed := velocity(patched, in_file), velocity(patched, RESIDENT))
    result["which changes it"] = not torch.equal(changed, plain)
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    result["and is gone"] = torch.equal(velocity(patcher, in_file), plain)

    transformer.weights = in_file
    clone = patcher.clone()
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    clone.register_all_hook_patches(hooks, target, {}, comfy.hooks.HookGroup())
    clone.patch_hooks(hooks)
    hooked = velocity(clone, in_file)
    result["on the conditioning"] = torch.allclose(hooked, changed, atol=1e-4)
    result["as it lies"] = torch.equal(hooked, velocity(clone, RESIDENT))
    transformer.weights = in_file
    clone.patch_hooks(None)
    result["and is gone, too"] = torch.equal(velocity(patcher, in_file), plain)
print("RESULT", json.dumps(result))
"""


def test_a_lora_on_the_modulation_counts_wherever_it_is(host):
    """ComfyUI puts another weight in the place of one that it patches, and writes into one that a hook patches."""
    constants = f"DEMO = {str(REPO / 'demo_model')!r}\n"
    result = json.loads(run_in_comfyui(host, constants + CODE).split("RESULT", 1)[1])
    assert [what for what, holds in result.items() if not holds] == []
