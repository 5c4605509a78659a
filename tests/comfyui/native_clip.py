"""Code for ``run_in_comfyui``: ComfyUI's text encoder of Qwen-Image with its sizes reduced, random weights."""

from pathlib import Path

SMALL_SIZES = (Path(__file__).parent / "probe_nodes" / "qwen_edit_probe" / "small_encoder.py").read_text("utf-8")

SMALL_NATIVE_CLIP = (
    SMALL_SIZES
    + """
import comfy.hooks
import comfy.sd
from comfy.model_patcher import ModelPatcher
from comfy.text_encoders import qwen_image


def small_native_clip(fp8=False, hidden=64):
    torch.manual_seed(0)
    clip = comfy.sd.CLIP(no_init=True)
    options = {"quantization_metadata": {"mixed_ops": True}} if fp8 else {}
    with small_sizes(hidden):
        clip.cond_stage_model = qwen_image.QwenImageTEModel(
            device="cpu", dtype=torch.bfloat16 if fp8 else torch.float32, model_options=options
        )
        # for the names and shapes of all weights; quantized layers are made with the file
        with torch.device("meta"):
            shapes = qwen_image.QwenImageTEModel(device="meta", dtype=torch.float32).qwen25_7b.transformer.state_dict()
    transformer = clip.cond_stage_model.qwen25_7b.transformer
    state = {}
    for name, tensor in shapes.items():
        state[name] = torch.randn(tensor.shape) * 0.1 + ("norm" in name or "ln_q" in name)
        if fp8:
            state[name] = state[name].bfloat16()
        if fp8 and "_proj.weight" in name and "visual" not in name:
            layer, scale = name.removesuffix("weight"), state[name].abs().max().float() / 448
            state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
            state[layer + "weight_scale"] = scale
            state[layer + "comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    missing, unexpected = transformer.load_state_dict(state)
    assert not missing and not unexpected
    clip.tokenizer = qwen_image.QwenImageTokenizer()
    device = torch.device("cpu")
    clip.patcher = ModelPatcher(clip.cond_stage_model, load_device=device, offload_device=device)
    clip.patcher.is_clip, clip.patcher.hook_mode = True, comfy.hooks.EnumHookMode.MinVram
    clip.layer_idx, clip.use_clip_schedule, clip.apply_hooks_to_conds, clip.tokenizer_options = None, False, None, {}
    return clip
"""
)
