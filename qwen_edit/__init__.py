"""The engine of Qwen Edit Fast. Knows nothing of ComfyUI: plain tensors, callbacks and frozen dataclasses."""
