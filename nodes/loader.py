"""QwenEditLoader: a diffusers folder, or ComfyUI's single files and checkpoints, as MODEL, CLIP and VAE."""

from comfy_api.latest import io

from ..qwen_edit.attention import CHOICES as ATTENTION
from ..qwen_edit.needs import explained_imports
from ..qwen_edit.precision import PRECISIONS, PROFILES
from .host import folders
from .host.request import OFFLOAD, VERSIONS, LoadRequest


class QwenEditLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoader",
            display_name="Qwen Edit Loader",
            category="Qwen Edit Fast",
            has_intermediate_output=True,  # its report is shown again when it comes from the cache
            description="Loads Qwen-Image-Edit once and keeps it. Weights are read when they are first needed.",
            search_aliases=["load model", "checkpoint", "gguf", "fp8", "int8", "2511", "2509"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=folders.models(),
                    default=folders.default_model(),
                    tooltip="A diffusers folder (models/diffusers/NAME with model_index.json), a safetensors or GGUF file from"
                    " models/diffusion_models, one from models/checkpoints that holds everything, or the small demo model.",
                ),
                io.Combo.Input(
                    "text_encoder",
                    options=folders.text_encoders(),
                    default=folders.FROM_MODEL,
                    tooltip="qwen_2.5_vl_7b for a transformer alone. A diffusers folder, and a file that holds everything, bring"
                    " their own. An encoder in a GGUF file needs its mmproj file beside it. none: the CLIP of another loader is"
                    " connected instead.",
                ),
                io.Combo.Input(
                    "vae",
                    options=folders.vaes(),
                    default=folders.FROM_MODEL,
                    tooltip="qwen_image_vae for a transformer alone. A diffusers folder, and a file that holds everything, bring "
                    "their own.",
                ),
                io.Combo.Input(
                    "profile",
                    options=list(PROFILES),
                    default="auto",
                    tooltip="quality: bf16. fast: fp8 (RTX 40 and later, H100), else int8. small: 4-bit weights, for cards below 16 GB,"
                    " less exact. auto: the first of these that fits on the card; on the CPU quality.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    advanced=True,
                    tooltip="auto: as the profile says; a quantized file runs as it is stored. fp8, int8, w4a8 and w4a4 (4 bit) "
                    "quantize a bf16 file while it is read; what does not run here falls back, and the node says so. fp16 "
                    "overflows in this model on many pictures.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTION),
                    default="auto",
                    advanced=True,
                    tooltip="auto: what was measured as the fastest on your card (by scripts/tune_attention.py, else cuDNN or"
                    " flash4 on Hopper), PyTorch's where nothing was. flash: FlashAttention 2. math: float32, slow, exact."
                    " sage computes in 8 bit and changes pictures a little. What does not run here falls back to PyTorch's,"
                    " and the node says so.",
                ),
                io.Combo.Input(
                    "offload",
                    options=list(OFFLOAD),
                    default="auto",
                    advanced=True,
                    tooltip="auto: as many of the transformer's blocks stay on the card as ComfyUI has room for when it is loaded;"
                    " the others come from RAM while the ones before them compute. none: all of it stays on the card. text"
                    " encoder: as auto, and the text encoder leaves the card after encoding. stream: all blocks come from RAM.",
                ),
                io.Combo.Input(
                    "model_version",
                    options=list(VERSIONS),
                    default="auto",
                    advanced=True,
                    tooltip="For single files: 2511 modulates the reference pictures at t = 0, 2509 does not. auto goes by the "
                    "file's mark, metadata or name, and the node says by which.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Clip.Output(display_name="CLIP"),
                io.Vae.Output(display_name="VAE"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        text_encoder,
        vae,
        profile="auto",
        precision="auto",
        attention="auto",
        offload="auto",
        model_version="auto",
    ) -> io.NodeOutput:
        with explained_imports():  # they bring diffusers: only when a node runs
            from .host.doctor import Report, report
            from .host.loading import load

        loaded = load(LoadRequest(model, text_encoder, vae, profile, precision, attention, offload, model_version))
        lines = [*loaded.notes[:1], *report(loaded.findings), *loaded.notes[1:]]
        return io.NodeOutput(loaded.model, loaded.clip, loaded.vae, ui=Report(lines, loaded.facts))

    @classmethod
    def fingerprint_inputs(cls, model, text_encoder, vae, **_):
        """Runs again when a file behind the same name changed."""
        names = [
            (folders.model_path, model),
            (folders.text_encoder_path, text_encoder),
            (folders.vae_path, vae),
        ]
        return tuple(folders.fingerprint_of(path_of, [name]) for path_of, name in names)
