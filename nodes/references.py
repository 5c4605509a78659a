"""QwenEditReferenceCache: reference pictures are not computed in every step."""

from comfy_api.latest import io, ui

from ..qwen_edit.needs import explained_imports
from ..qwen_edit.values import check_number

DEFAULT_TOLERANCE = 0.1


class QwenEditReferenceCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditReferenceCache",
            display_name="Qwen Edit Reference Cache",
            category="Qwen Edit Fast",
            has_intermediate_output=True,  # its report is shown again when it comes from the cache
            description="Computes the reference pictures in some steps only and keeps what they contribute for the others:"
            " much faster, most of all with several pictures. The result is not quite the same; the help page has the cost.",
            search_aliases=["faster", "cache", "teacache", "easycache", "speed up", "references"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="From Qwen Edit Loader or Qwen Edit Accelerate, with or without LoRAs."
                ),
                io.Float.Input(
                    "tolerance",
                    default=DEFAULT_TOLERANCE,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How far the noise (sigma, from 1 to 0) may fall before the references are computed again. 0: they"
                    " are computed in every step. 0.1 is for 20 steps and more; 8 steps need 0.2, 4 steps 0.25.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL")],
        )

    @classmethod
    def execute(cls, model, tolerance=DEFAULT_TOLERANCE) -> io.NodeOutput:
        check_number("tolerance", tolerance, 0, 1)
        with explained_imports():  # they bring diffusers: only when a node runs
            from .host.accelerate import require_our_forward
            from .host.reference_cache import cache_references

        require_our_forward(model, "can keep the references", "or load the model with Qwen Edit Loader")
        said = (
            f"References are computed again when sigma has fallen by more than {tolerance:g}."
            if tolerance
            else "Off: the references are computed in every step."
        )
        return io.NodeOutput(cache_references(model, tolerance), ui=ui.PreviewText(said))
