"""Qwen Edit Fast: Qwen-Image-Edit-2511 for ComfyUI."""
