"""ComfyUI's text encoder of Qwen-Image with its sizes reduced."""

import contextlib

from comfy.text_encoders import llama, qwen_vl


@contextlib.contextmanager
def small_sizes(hidden=64, heads=2, kv_heads=1):
    config, vision = llama.Qwen25_7BVLI_Config, qwen_vl.Qwen2VLVisionTransformer
    llama.Qwen25_7BVLI_Config = lambda **_: config(
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    qwen_vl.Qwen2VLVisionTransformer = lambda hidden_size, **given: vision(
        hidden_size=64, num_heads=4, intermediate_size=64, num_layers=8, **given
    )
    try:
        yield
    finally:
        llama.Qwen25_7BVLI_Config, qwen_vl.Qwen2VLVisionTransformer = config, vision
