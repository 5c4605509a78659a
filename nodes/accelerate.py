"""QwenEditAccelerate: the fast forward for a MODEL from any loader."""

from comfy_api.latest import io

from ..qwen_edit.attention import CHOICES as ATTENTION
from ..qwen_edit.needs import explained_imports


class QwenEditAccelerate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditAccelerate",
            display_name="Qwen Edit Accelerate",
            category="Qwen Edit Fast",
            has_intermediate_output=True,  # its report is shown again when it comes from the cache
            description="Makes an existing Qwen-Image-Edit workflow faster: put it between the model loader (and LoRA"
            " loaders) and the sampler. The weights stay as they were loaded.",
            search_aliases=["fast", "speed up", "faster", "attention", "fp8"],
            inputs=[
                io.Model.Input("model", tooltip="From any loader: Load Diffusion Model, checkpoints, GGUF."),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTION),
                    default="auto",
                    advanced=True,
                    tooltip="As on Qwen Edit Loader.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL")],
        )

    @classmethod
    def execute(cls, model, attention="auto") -> io.NodeOutput:
        with explained_imports():  # they bring diffusers: only when a node runs
            from .host.accelerate import accelerate

        accelerated, report = accelerate(model, attention)
        return io.NodeOutput(accelerated, ui=report)
