"""The only folder that knows ComfyUI's internals: model, memory, sampling, folders, progress."""
