"""Code for ``run_in_comfyui``: ComfyUI's text encoder of Qwen-Image with its sizes reduced, random weights."""

SMALL_NATIVE_CLIP = """
import comfy.hooks
import comfy.sd
from comfy.model_patcher import ModelPatcher
from comfy.text_encoders import llama, qwen_image, qwen_vl


def small_native_clip():
    config, vision = llama.Qwen25_7BVLI_Config, qwen_vl.Qwen2VLVisionTransformer
    llama.Qwen25_7BVLI_Config = lambda **_: config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    qwen_vl.Qwen2VLVisionTransformer = lambda hidden_size, **given: vision(
        hidden_size=64, num_heads=4, intermediate_size=64, num_layers=8, **given
    )
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = qwen_image.QwenImageTEModel(device="cpu", dtype=torch.float32)
    llama.Qwen25_7BVLI_Config, qwen_vl.Qwen2VLVisionTransformer = config, vision
    for name, parameter in clip.cond_stage_model.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * 0.1 + ("norm" in name or "ln_q" in name))
    clip.tokenizer = qwen_image.QwenImageTokenizer()
    device = torch.device("cpu")
    clip.patcher = ModelPatcher(clip.cond_stage_model, load_device=device, offload_device=device)
    clip.patcher.is_clip, clip.patcher.hook_mode = True, comfy.hooks.EnumHookMode.MinVram
    clip.layer_idx, clip.use_clip_schedule, clip.apply_hooks_to_conds, clip.tokenizer_options = None, False, None, {}
    return clip
"""
