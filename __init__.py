"""Qwen Edit Fast: Qwen-Image-Edit-2511 in ComfyUI, fast and light and never silently worse."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls to learn the pack's nodes. Imports happen here, so that tests and scripts can import the
    engine without ComfyUI."""
    from .qwen_edit.needs import explained_imports

    with explained_imports():
        from comfy_api.latest import ComfyExtension

        from .nodes import NODES
        from .nodes.host import canvas, collector, doctor, perf_panel, status

    class QwenEditFast(ComfyExtension):
        async def on_load(self):
            for part in (canvas, collector, doctor, perf_panel, status):
                part.register()

        async def get_node_list(self):
            return NODES

    return QwenEditFast()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
