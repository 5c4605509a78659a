"""ComfyUI's own transformer with given weights, for measurements beside ours. Imports ComfyUI into this process."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

REPO = Path(__file__).resolve().parents[1]
PACK = "qwen_edit_fast"
FORMS = {"fp8": "TensorCoreFP8E4M3Layout", "int8": "TensorWiseINT8Layout"}


def import_comfyui(path: Path) -> None:
    """Put ComfyUI on the path and keep it from reading this script's arguments."""
    sys.path.insert(0, str(path))
    arguments, sys.argv = sys.argv, sys.argv[:1]
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    sys.argv = arguments
    import comfy.model_management


def native_transformer(source: Any, form: str | None = None) -> nn.Module:
    """ComfyUI's transformer over the same parameters as ``source`` (2511, full width).

    Args:
        form: None for the weights as they are; "fp8": one scale a tensor, as in the official fp8mixed file; "int8": with
            rotation, as in the official int8_convrot file. Linears outside the blocks stay as they are.
    """
    import comfy.ops
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
    from comfy.quant_ops import QuantizedTensor

    operations = comfy.ops.manual_cast if form is None else comfy.ops.mixed_precision_ops({}, torch.bfloat16)
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(
            num_layers=len(source.transformer_blocks),
            default_ref_method="index_timestep_zero",
            dtype=torch.bfloat16,
            operations=operations,
        )
    for name, parameter in source.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = parameter
        if form is not None and leaf == "weight" and parameter.ndim == 2 and owner.startswith("transformer_blocks."):
            options = {"per_channel": True, "convrot": True} if form == "int8" else {"scale": "recalculate"}
            tensor = QuantizedTensor.from_float(parameter, FORMS[form], **options)
            module.layout_type = FORMS[form]
            module.quant_format = {"fp8": "float8_e4m3fn", "int8": "int8_tensorwise"}[form]
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    return model.eval()


def accelerated(native: Any, form: str | None) -> Callable[..., torch.Tensor]:
    """What QwenEditAccelerate runs in place of ``native``'s own forward, called like it: ours over ComfyUI's modules, their
    weights through ComfyUI's casting (without DynamicVRAM, which needs a server; there each takes less time)."""
    if PACK not in sys.modules:
        spec: Any = importlib.util.spec_from_file_location(
            PACK, REPO / "__init__.py", submodule_search_locations=[str(REPO)]
        )
        sys.modules[PACK] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACK])
    host, attention, kernels, modulation, transformer = (
        importlib.import_module(f"{PACK}.{name}")
        for name in (
            "nodes.host.accelerate",
            "qwen_edit.attention",
            "qwen_edit.kernels",
            "qwen_edit.modulation",
            "qwen_edit.transformer",
        )
    )
    device, dtype = native.img_in.weight.device, torch.bfloat16
    choice = attention.resolve("auto", device, dtype, 128)
    fused = kernels.resolve_kernels(device, dtype, host._activations(native, device, dtype))
    tables, row_scales = modulation.ModulationCache(), {}

    def forward(x, timesteps, context, ref_latents) -> torch.Tensor:
        weights = host.CastWeights(x.device, x.dtype, row_scales)
        try:
            return host.run_forward(
                native,
                transformer.Forward(choice.attend, fused, weights, positions="comfyui"),
                (x, *ref_latents),
                timesteps,
                context,
                None,
                {"sample_sigmas": timesteps},
                axes_dims=tuple(native.pe_embedder.axes_dim),
                zero_cond_t=True,
                modulation=tables,
                modulation_key=form,
            )
        finally:
            weights.release()

    return forward
