"""Quantized single files through ComfyUI's own loader and through ours, on the CPU in fp32."""

import json
from pathlib import Path

import pytest
import torch
from comfy_process import run_in_comfyui
from safetensors.torch import save_file
from stored_files import VARIANTS, float_state, write

pytestmark = [pytest.mark.server, pytest.mark.slow]

CODE = """
import json
import comfy.model_detection
import comfy.model_management
import comfy.sd
from types import SimpleNamespace
from pack.nodes.host.model import make_model
from pack.qwen_edit.attention import resolve
from pack.qwen_edit.checkpoints import transformer_from_file
from pack.qwen_edit.kernels import REFERENCE
from pack.qwen_edit.precision import Precision, keep_stored_form
from pack.qwen_edit.quantize import QuantizedTensor, stored_bytes
from pack.qwen_edit.stored_weights import families
from server import PromptServer

# what a patcher asks before it drops weights: whether a prompt runs
PromptServer.instance = SimpleNamespace(prompt_queue=SimpleNamespace(currently_running=True))
detect = comfy.model_detection.detect_unet_config


def detect_any_width(state, prefix, *args, **kwargs):
    config = detect(state, prefix, *args, **kwargs)
    config["num_attention_heads"] = state[f"{prefix}img_in.weight"].shape[0] // 128
    config["joint_attention_dim"] = state[f"{prefix}txt_norm.weight"].shape[0]
    return config


comfy.model_detection.detect_unet_config = detect_any_width  # ComfyUI knows the released width only
cpu, fp32 = torch.device("cpu"), torch.float32
generator = torch.Generator().manual_seed(1)
x, reference = (torch.randn(1, 16, 1, 16, 16, generator=generator) for _ in range(2))
text = torch.randn(1, 9, 256, generator=generator)


def velocity(patcher):
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    return patcher.model.diffusion_model(x, torch.tensor([0.6]), text, ref_latents=[reference])


def model_of(path, precision=None, **options):
    source = transformer_from_file(Path(path))
    kept = keep_stored_form("auto", cpu, fp32, families(source.stored))
    return make_model(source, precision or kept, None, resolve("pytorch", cpu, fp32, 128), REFERENCE, **options)


def make_float(native):
    for module in native.model.modules():
        if isinstance(getattr(module, "weight", None), QuantizedTensor):
            full = module.weight.dequantize()
            if getattr(module, "pre_quant_scale", None) is not None:
                full, module.pre_quant_scale = full * module.pre_quant_scale.float(), None
            module.weight, module.layout_type = torch.nn.Parameter(full, requires_grad=False), None


def off(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def bits(patcher):
    found = {}
    for name, parameter in patcher.model.diffusion_model.named_parameters():
        quantized = isinstance(parameter, QuantizedTensor)
        fields = vars(parameter._params).values() if quantized else ()
        # floats in one dtype: those of the modulation stay in that of their file
        plain = parameter.float() if parameter.is_floating_point() else parameter
        parts = (parameter._qdata, *(f for f in fields if isinstance(f, torch.Tensor))) if quantized else (plain,)
        found[name] = [part.detach().clone().reshape(-1).view(torch.uint8) for part in parts]
    return found


def same(one, other):
    return all(torch.equal(a, b) for n, parts in one.items() for a, b in zip(parts, other[n], strict=True))


FLOAT = Precision("fp32", fp32, None, "")
"""

COMPARE = """
result = {}
with torch.inference_mode():
    for variant, path in json.loads(PATHS).items():
        native = comfy.sd.load_diffusion_model(path)
        theirs = velocity(native)
        make_float(native)
        exact = velocity(native)
        stored = model_of(path)
        promised = stored.model_size()
        ours = velocity(stored)
        kept = {}
        for module in stored.model.diffusion_model.modules():
            if isinstance(getattr(module, "weight", None), QuantizedTensor):
                kept[type(module).__name__] = kept.get(type(module).__name__, 0) + 1
        before, held = bits(stored), 0
        for name, parts in before.items():
            held += sum(part.nbytes for part in parts) if "_mod." not in name else 0
        stored.release()
        result[variant] = {
            "float": off(velocity(model_of(path, FLOAT)), exact),
            "stored": off(ours, exact),
            "native": off(theirs, exact),
            "refilled": torch.equal(ours, velocity(stored)) and same(bits(stored), before),
            "kept": kept,
            "promised": promised / held,
        }
        if variant in OTHER_WAYS:
            result[variant]["streamed"] = torch.equal(ours, velocity(model_of(path, stream=True)))
            result[variant]["int8"] = off(velocity(model_of(path, Precision("int8", fp32, "int8", ""))), exact)
print("RESULT", json.dumps(result))
"""
OTHER_WAYS = ("fp8 scaled", "int8_convrot", "nvfp4 smoothed")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stored")
    prefixes = dict(zip(VARIANTS, ["", "model.diffusion_model."] * len(VARIANTS), strict=False))
    for variant, prefix in prefixes.items():
        write(folder / f"{variant}.safetensors", variant, prefix)
    return {variant: folder / f"{variant}.safetensors" for variant in VARIANTS}


def _paths(files: dict[str, Path]) -> str:
    return json.dumps({variant: str(path) for variant, path in files.items()})


@pytest.fixture(scope="module")
def compared(host, files) -> dict:
    constants = f"PATHS, OTHER_WAYS = {_paths(files)!r}, {OTHER_WAYS}\n"
    return json.loads(run_in_comfyui(host, constants + CODE + COMPARE, 500).split("RESULT", 1)[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_made_float_it_equals_what_comfyui_reads(compared, variant):
    assert compared[variant]["float"] < 1e-6


# Which linears keep the stored weights: 24 in the blocks and 4 of the modulation, and how far the velocity may be from
# float products. Activations are rounded to 8 bits where ours or comfy-kitchen's products do (measured: fp8 0.0057, int8
# 0.002, w4a4 with 8-bit activations 0.0018); a dequantized weight is multiplied exactly.
EXACT, FP8, INT8 = 1e-6, 0.008, 0.004
IN_RAM = {"StoredInRam": 4}
KEPT = {
    "fp8 plain": (IN_RAM | {"QuantizedLinear": 24}, FP8),
    "fp8 plain, some": ({"QuantizedLinear": 24}, FP8),
    "e5m2 plain": (IN_RAM | {"QuantizedLinear": 24}, FP8),
    "fp8 scaled, old": (IN_RAM | {"QuantizedLinear": 24}, FP8),
    "fp8 scaled, old, full precision": (IN_RAM | {"DequantizedLinear": 24}, EXACT),
    "fp8 scaled": (IN_RAM | {"QuantizedLinear": 24}, FP8),
    "e5m2 scaled": (IN_RAM | {"QuantizedLinear": 24}, FP8),
    "fp8 full precision": (IN_RAM | {"DequantizedLinear": 24}, EXACT),
    "fp8 mixed": ({"QuantizedLinear": 8}, FP8),
    "fp8 by metadata": (IN_RAM | {"QuantizedLinear": 24}, FP8),
    "int8 tensorwise": (IN_RAM | {"QuantizedLinear": 24}, INT8),
    "int8 rowwise": (IN_RAM | {"QuantizedLinear": 24}, INT8),
    "int8_convrot": (IN_RAM | {"KitchenLinear": 24}, INT8),
    "int8_convrot 64": (IN_RAM | {"KitchenLinear": 24}, INT8),
    "w4a4": (IN_RAM | {"FourBitLinear": 24}, INT8),
    "nvfp4": (IN_RAM | {"DequantizedLinear": 24}, EXACT),
    "mxfp8": (IN_RAM | {"DequantizedLinear": 24}, EXACT),
    "nvfp4 and fp8": ({"QuantizedLinear": 16, "DequantizedLinear": 8}, FP8),
    "nvfp4 smoothed": ({"DequantizedLinear": 24}, EXACT),
    "int8 and fp8": ({"QuantizedLinear": 16, "DequantizedLinear": 8}, FP8),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_stored_it_stays_quantized_and_close(compared, variant):
    kept, most = KEPT[variant]
    assert compared[variant]["kept"] == kept
    assert compared[variant]["stored"] < most


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "int8" in v or v == "w4a4"])
def test_where_comfyui_rounds_activations_too_ours_is_no_worse(compared, variant):
    assert compared[variant]["stored"] < 1.1 * compared[variant]["native"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_that_were_dropped_are_read_again_to_the_bit(compared, variant):
    assert compared[variant]["refilled"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_size_that_memory_is_asked_for_is_the_size(compared, variant):
    assert abs(compared[variant]["promised"] - 1) < 1e-3


@pytest.mark.parametrize("variant", OTHER_WAYS)
def test_streamed_it_is_the_same_and_quantized_again_it_is_close(compared, variant):
    assert compared[variant]["streamed"]
    assert compared[variant]["int8"] < INT8


# ComfyUI's LoRA patches

PATCH = """
import comfy.utils

lora = comfy.utils.load_torch_file(LORA)
result = {}
with torch.inference_mode():
    for variant, path in json.loads(PATHS).items():
        if variant not in PATCHED:
            continue
        changes = []
        for model in (model_of(path, FLOAT), model_of(path)):
            before, stored = velocity(model), bits(model)
            patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
            changes.append(velocity(patched) - before)
            parameters = dict(patched.model.diffusion_model.named_parameters())
            in_ram = all(p.device.type == "cpu" for n, p in parameters.items() if "_mod." in n)
            quantized = isinstance(parameters["transformer_blocks.1.img_mlp.net.0.proj.weight"], QuantizedTensor)
            restored = torch.equal(velocity(model), before) and same(bits(model), stored)
        wanted, change = changes
        cosine = torch.cosine_similarity(change.flatten(), wanted.flatten(), 0).item()
        result[variant] = [restored, quantized and in_ram, cosine, (change.norm() / wanted.norm()).item()]
print("RESULT", json.dumps(result))
"""
# Least cosine between the LoRA's change and the one on float weights, and how far their lengths may differ.
PATCHED = {
    "fp8 scaled": (0.97, 0.04),
    "fp8 full precision": (0.97, 0.04),
    "int8 tensorwise": (0.99, 0.02),
    "int8_convrot": (0.99, 0.02),
    "mxfp8": (0.97, 0.04),
    "nvfp4": (0.75, 0.3),
    "nvfp4 smoothed": (0.75, 0.3),
    "w4a4": (0.75, 0.3),
}


@pytest.fixture(scope="module")
def patched(host, files, tmp_path_factory) -> dict:
    state = float_state()
    lora = {}
    for name, tensor in state.items():
        if name.startswith("transformer_blocks.1.") and tensor.ndim == 2:
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            lora[f"{layer}.lora_up.weight"] = torch.randn(tensor.shape[0], 4) * 0.1
            lora[f"{layer}.lora_down.weight"] = torch.randn(4, tensor.shape[1]) * 0.1
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(lora, path)
    constants = f"LORA, PATCHED, PATHS = {str(path)!r}, {tuple(PATCHED)}, {_paths(files)!r}\n"
    return json.loads(run_in_comfyui(host, constants + CODE + PATCH, 500).split("RESULT", 1)[1])


@pytest.mark.parametrize("variant", PATCHED)
def test_a_native_lora_patch_on_stored_weights(patched, variant):
    restored, as_before, cosine, ratio = patched[variant]
    least, off = PATCHED[variant]
    assert restored
    assert as_before
    assert cosine > least
    assert abs(ratio - 1) < off


# Files that ComfyUI saves

SAVE = """
result = {}
with torch.inference_mode():
    for variant, path in json.loads(PATHS).items():
        if variant in SAVED:
            saved = str(Path(FOLDER) / "saved.safetensors")
            comfy.sd.save_checkpoint(saved, comfy.sd.load_diffusion_model(path))
            source = transformer_from_file(Path(saved))
            one, other = model_of(path), model_of(saved)
            result[variant] = [torch.equal(velocity(one), velocity(other)), same(bits(one), bits(other)), source.config["zero_cond_t"]]
    ours = str(Path(FOLDER) / "ours.safetensors")
    model = model_of(json.loads(PATHS)["fp8 plain, some"], FLOAT)
    comfy.sd.save_checkpoint(ours, model)
    result["ours"] = off(velocity(comfy.sd.load_diffusion_model(ours)), velocity(model))
    try:
        comfy.sd.save_checkpoint(ours, model_of(json.loads(PATHS)["fp8 plain, some"]))
    except ValueError as error:
        result["refused"] = str(error)
print("RESULT", json.dumps(result))
"""
SAVED = (
    "fp8 scaled, old",
    "fp8 full precision",
    "int8_convrot",
    "w4a4",
    "nvfp4",
    "nvfp4 smoothed",
    "mxfp8",
)


@pytest.fixture(scope="module")
def saved(host, files, tmp_path_factory) -> dict:
    constants = f"FOLDER, SAVED, PATHS = {str(tmp_path_factory.mktemp('saved'))!r}, {SAVED}, {_paths(files)!r}\n"
    return json.loads(run_in_comfyui(host, constants + CODE + SAVE, 500).split("RESULT", 1)[1])


@pytest.mark.parametrize("variant", SAVED)
def test_what_comfyui_saves_of_its_own_model_is_the_same_to_us(saved, variant):
    assert saved[variant] == [True, True, True]


def test_what_comfyui_saves_of_our_model(saved):
    """As 2511, which is how ComfyUI's loader has to read it to give the same; quantized weights are not written."""
    assert saved["ours"] < 1e-6
    assert saved["refused"].startswith("[QE_INPUT] A MODEL of QwenEditLoader in fp8")


# One linear of the released width

LAYER = """
import comfy.ops
import comfy.utils
from pack.qwen_edit.checkpoints import read_header, read_metadata
from pack.qwen_edit.stored_formats import take_stored_weights
from pack.qwen_edit.stored_weights import as_quantized
from safetensors.torch import load_file

result, name = {}, "transformer_blocks.0.attn.to_q.weight"
with torch.inference_mode():
    for path in Path(FOLDER).glob("*.safetensors"):
        names = {key: key for key in read_header(path)}
        (stored,) = take_stored_weights(path, read_header(path), names, {}).values()
        state = load_file(path)
        scales = {what: state[key] for what, key in stored.scales.items()}
        ours = as_quantized(stored, state[name], scales, (3072, 3072), torch.bfloat16)
        state, _ = comfy.utils.convert_old_quants(state)
        native = comfy.ops.mixed_precision_ops().Linear(3072, 3072, bias=False)
        native.load_state_dict({key.rpartition(".")[2]: tensor for key, tensor in state.items()})
        expected = native.weight.dequantize() if isinstance(native.weight, QuantizedTensor) else native.weight
        result[path.stem] = off(ours.dequantize().float(), expected.float())
print("RESULT", json.dumps(result))
"""
WIDE = [v for v in VARIANTS if v not in ("fp8 mixed", "fp8 by metadata", "int8 and fp8", "nvfp4 and fp8", "e5m2 plain")]


@pytest.fixture(scope="module")
def wide(host, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("wide")
    weight = (torch.randn(3072, 3072, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    for variant in WIDE:
        state = VARIANTS[variant]({"transformer_blocks.0.attn.to_q.weight": weight})
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / f"{variant}.safetensors")
    return json.loads(run_in_comfyui(host, f"FOLDER = {str(folder)!r}\n{CODE}{LAYER}", 300).split("RESULT", 1)[1])


@pytest.mark.parametrize("variant", WIDE)
def test_a_linear_of_the_released_width_is_what_comfyui_reads(wide, variant):
    """Both in bf16; comfy-kitchen rounds a scale to it before it multiplies, ours after."""
    assert wide[variant] < (0.004 if "fp8" in variant or "e5m2" in variant else 1e-6)
