"""From what the loader's combos say to MODEL, CLIP and VAE, kept by their owner between prompts."""

from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths
import torch

from ...qwen_edit.attention import CHOICES as ATTENTION
from ...qwen_edit.attention import resolve
from ...qwen_edit.checkpoints import (
    TransformerSource,
    block_bytes,
    fingerprint,
    is_edit_folder,
    read_header,
    transformer_from_file,
    transformer_from_folder,
    weight_files,
)
from ...qwen_edit.doctor import Finding, ModelFacts, examine_model, examine_vae
from ...qwen_edit.errors import INPUT, WEIGHTS
from ...qwen_edit.gguf import SUFFIX as GGUF
from ...qwen_edit.gguf_encoder import vision_files
from ...qwen_edit.kernels import FusedKernels, resolve_kernels
from ...qwen_edit.packed import PACKED
from ...qwen_edit.precision import (
    PRECISIONS,
    PROFILES,
    Precision,
    keep_stored_form,
    resolve_precision,
)
from ...qwen_edit.quantize import stored_bytes
from ...qwen_edit.stored_weights import families
from ...qwen_edit.streaming import streamed_blocks
from ...qwen_edit.values import check_choice
from . import folders
from .clip import OFFLOAD_AFTER_USE, SAVED_CLIP_PREFIX, load_clip, load_saved_clip
from .doctor import keep_facts
from .facts import model_facts
from .gguf_clip import GgufTextModel, load_gguf_clip
from .memory import Owner, ShellPatcher
from .model import make_model
from .prompts import ask_for_bfloat16
from .request import OFFLOAD, VERSIONS, LoadRequest
from .transformer_patcher import Sizes
from .vae import load_single_vae, load_vae, statistics, vae_facts

# Where files that hold everything have the parts besides the transformer (comfy/supported_models.py QwenImage).
ENCODER_PREFIX, VAE_PREFIX = "text_encoders.", "vae."
VISION = "visual."  # in the names of a text encoder that sees pictures


@dataclass(frozen=True)
class Loaded:
    """What the loader hands out; ``notes`` are shown on the node, and after the first of them the ``findings``. Without a
    ``clip`` another node brings one. ``facts`` are those of the model."""

    model: ShellPatcher
    clip: comfy.sd.CLIP | None
    vae: comfy.sd.VAE
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]
    facts: ModelFacts

    @property
    def nbytes(self) -> int:
        return weights_size(self.model) + sum(p.patcher.model_size() for p in (self.clip, self.vae) if p is not None)

    @property
    def shells(self) -> list[ShellPatcher]:
        patchers = [self.model] if self.clip is None else [self.model, self.clip.patcher]
        return [p for p in patchers if isinstance(p, ShellPatcher)]


OWNER: Owner[Loaded] = Owner(lambda loaded: loaded.shells)


def load(request: LoadRequest) -> Loaded:
    """The loaded model, reused when the same files were loaded the same way before.

    Raises:
        ValueError: a value that is not offered, or files that can't be used (see ``checkpoints``).
    """
    for what, value, offered in (
        ("profile", request.profile, PROFILES),
        ("precision", request.precision, PRECISIONS),
        ("attention", request.attention, ATTENTION),
        ("offload", request.offload, OFFLOAD),
        ("model_version", request.model_version, VERSIONS),
    ):
        check_choice(what, value, offered)
    path = folders.model_path(request.model)
    # Before what goes with it: nobody should look for a text encoder to a file that is no transformer of this model.
    source = (
        transformer_from_folder(path) if path.is_dir() else transformer_from_file(path, VERSIONS[request.model_version])
    )
    encoder, vae = _companions(request, path)
    key = (
        request,
        source.fingerprint,
        None if encoder is None else fingerprint(_files(encoder, "text_encoder")),
        fingerprint(_files(vae, "vae")),
    )
    loaded, _ = OWNER.get(key, lambda: _make(request, source, encoder, vae), lambda made: made.nbytes)
    return loaded


def _companions(request: LoadRequest, path: Path) -> tuple[Path | None, Path]:
    """Paths of text encoder (or None) and VAE: the model's folder or file, or a single file."""
    from_model = {
        what: prefix
        for what, prefix, value in (
            ("text encoder", ENCODER_PREFIX, request.text_encoder),
            ("VAE", VAE_PREFIX, request.vae),
        )
        if value == folders.FROM_MODEL
    }
    if from_model and not path.is_dir():
        names = read_header(path)
        missing = [what for what, prefix in from_model.items() if not any(name.startswith(prefix) for name in names)]
        if missing:
            held = [f"a {what}" for what in from_model if what not in missing]
            raise ValueError(
                f"{INPUT} {request.model} holds the transformer {f'and {held[0]} ' if held else ''}only. Choose a"
                f" {' and a '.join(missing)} too (for example qwen_2.5_vl_7b.safetensors and qwen_image_vae.safetensors)."
            )
    encoder = path
    if request.text_encoder != folders.FROM_MODEL:
        none = request.text_encoder == folders.NONE
        encoder = None if none else folders.text_encoder_path(request.text_encoder)
    vae = path if request.vae == folders.FROM_MODEL else folders.vae_path(request.vae)
    return encoder, vae


def _files(path: Path, component: str) -> list[Path]:
    """What a component is read from, and what decides where."""
    if path.is_dir():
        return weight_files(path / component)
    return [path, *vision_files(path)] if path.suffix.lower() == GGUF else [path]


def _make(request: LoadRequest, source: TransformerSource, encoder: Path | None, vae_path: Path) -> Loaded:
    device = comfy.model_management.get_torch_device()
    precision = _precision(request, source, device)
    head_dim = int(source.config.get("attention_head_dim", 128))
    attention = resolve(request.attention, device, precision.dtype, head_dim, folders.tuned_attention())
    kernels = resolve_kernels(device, precision.dtype, precision.activations(device))
    # The model first, because it takes no memory yet and tells whether the files fit.
    latents = statistics(vae_path) if vae_path.is_dir() else None
    offload = {"stream": request.offload == "stream", "keep_on_card": request.offload == "none"}
    model = make_model(source, precision, latents, attention, kernels, **offload)
    clip = None if encoder is None else _clip(request, encoder)
    vae = load_vae(vae_path) if vae_path.is_dir() else _single_vae(request, vae_path)
    facts = model_facts(source, precision, attention, kernels)
    keep_facts(model.model, facts)
    own = source.label if _replaces_own_statistics(source, vae_path) else None
    findings = examine_model(facts) + examine_vae(vae_facts(vae, vae_path.name, own))
    notes = _notes(source, precision, attention, kernels, model)
    if clip is not None and isinstance(clip.cond_stage_model, GgufTextModel):
        notes.append(f"The text encoder sees pictures with {clip.cond_stage_model.source.vision.name}.")
    if clip is not None and encoder is not None and not encoder.is_dir() and ask_for_bfloat16(clip):
        notes.append("The text encoder computes in bf16, as in the official pipeline; with other encode nodes in fp32.")
    notes += _streaming_notes(request, model, device)
    return Loaded(model, clip, vae, tuple(notes), findings, facts)


def _replaces_own_statistics(source: TransformerSource, vae: Path) -> bool:
    """Whether the model is a folder whose VAE has latent statistics of its own, and another VAE stands in for it."""
    folder = next(iter(source.tensors.values()))[0].parent.parent
    return is_edit_folder(folder) and folder != vae and statistics(folder) is not None


def _streaming_notes(request: LoadRequest, model: ShellPatcher, device: torch.device) -> list[str]:
    """What can be said before it is loaded: what is free then decides, and the node that samples says what that was."""
    if request.offload == "none" or comfy.model_management.is_device_cpu(device):
        return []
    sizes: Sizes = model.model.sizes
    memory = comfy.model_management.get_total_memory(device)
    at_most = memory - comfy.model_management.minimum_inference_memory()
    streamed = tuple(range(len(sizes.blocks)))
    if request.offload == "auto":
        streamed = streamed_blocks(sizes.blocks, at_most - sizes.others)
    if not streamed:
        return []
    copied = sum(sizes.blocks[index] for index in streamed)
    least = "" if request.offload == "stream" else "at least "
    return [
        f"{_gib(weights_size(model))} of weights on a card of {_gib(memory)}: {least}{len(streamed)} of {len(sizes.blocks)}"
        f" blocks are streamed from RAM, {_gib(copied)} in each forward."
    ]


def weights_size(model: ShellPatcher) -> int:
    """Bytes of all weights, wherever they are, but for the modulation; with offload "stream", model_size counts what the card
    sees."""
    return stored_bytes(model.model.diffusion_model)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _precision(request: LoadRequest, source: TransformerSource, device: torch.device) -> Precision:
    bf16 = not comfy.model_management.is_device_cpu(device) and comfy.model_management.should_use_bf16(device)
    half = torch.bfloat16 if bf16 else torch.float32
    if source.blocks and request.precision == "auto":
        return Precision("auto", half, PACKED, f"as stored in the file, {_held(source)}")
    kept = keep_stored_form(request.precision, device, half, families(source.stored))
    if kept is not None:
        return kept
    memory = comfy.model_management.get_total_memory(device)
    return resolve_precision(request.precision, request.profile, device, half, block_bytes(source), memory)


def _clip(request: LoadRequest, path: Path) -> comfy.sd.CLIP:
    keep_on_card = request.offload == "none"
    clip = load_clip(path, keep_on_card=keep_on_card) if path.is_dir() else _single_clip(request, path)
    if request.offload == "text encoder":
        clip.patcher.set_attachments(OFFLOAD_AFTER_USE, True)
    return clip


def _single_clip(request: LoadRequest, path: Path) -> comfy.sd.CLIP:
    if path.suffix.lower() == GGUF:
        return load_gguf_clip(path, keep_on_card=request.offload == "none")
    # by this tensor ComfyUI tells the encoder too; what it does not know it would load as another model's
    _header_of(path, "model.layers.0.self_attn.k_proj.bias", [512], "the text encoder of Qwen-Image, Qwen2.5-VL 7B")
    names = read_header(path)
    if not any(VISION in name for name in names):
        raise ValueError(
            f"{WEIGHTS} {path.name} is Qwen2.5 7B for text only: it has no tensor {VISION}*, so it sees no pictures. Choose"
            " Qwen2.5-VL 7B (for example qwen_2.5_vl_7b.safetensors or qwen_2.5_vl_7b_fp8_scaled.safetensors)."
        )
    embeddings = folder_paths.get_folder_paths("embeddings")
    if request.text_encoder == folders.FROM_MODEL:
        return comfy.sd.load_checkpoint_guess_config(
            str(path), output_model=False, output_vae=False, embedding_directory=embeddings
        )[1]
    if any(name.startswith(SAVED_CLIP_PREFIX) for name in names):
        return load_saved_clip(path, embeddings)
    return comfy.sd.load_clip([str(path)], embedding_directory=embeddings, clip_type=comfy.sd.CLIPType.QWEN_IMAGE)


def _single_vae(request: LoadRequest, path: Path) -> comfy.sd.VAE:
    _header_of(path, "decoder.middle.0.residual.0.gamma", None, "the VAE of Qwen-Image")
    return load_single_vae(path, VAE_PREFIX if request.vae == folders.FROM_MODEL else "")


def _header_of(path: Path, key: str, shape: list[int] | None, what: str) -> None:
    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise ValueError(f"{WEIGHTS} {path.name} is no safetensors file. This node loads {what} from those only.")
    found = next((entry["shape"] for name, entry in read_header(path).items() if name.endswith(key)), None)
    if found is None or shape not in (None, found):
        tensor = "it has no tensor" if found is None else f"its shape is {found}, not {shape}, in"
        raise ValueError(f"{WEIGHTS} {path.name} is not {what}: {tensor} {key}.")


def _notes(
    source: TransformerSource, precision: Precision, attention, kernels: FusedKernels, model: ShellPatcher
) -> list[str]:
    version = "2511" if source.config.get("zero_cond_t") else "2509"
    by = f", by {source.version_by}" if source.version_by is not None else ""
    notes = [
        f"{source.label} ({version}{by}), {precision.name}, {weights_size(model) / 2**30:.2f} GiB, attention {attention.name},"
        f" kernels {kernels.name}"
    ]
    notes += _precision_notes(source, precision)
    if not attention.fell_back:
        notes.append(f"Attention {attention.name}: {attention.why}")
    return notes


def _held(source: TransformerSource) -> str:
    """How many of the blocks' linears a file has quantized, and how; empty if none."""
    counts = families({**source.stored, **source.blocks})
    return ", ".join(f"{count} linears of the blocks in {family}" for family, count in counts.most_common())


def _precision_notes(source: TransformerSource, precision: Precision) -> list[str]:
    held = _held(source)
    if precision.stored:
        notes = [f"Precision {precision.name}: as stored in the file, {held}"]
        in_full = sum(w.full_precision for w in source.stored.values()) if precision.wanted == "auto" else 0
        if in_full:
            notes.append(
                f"The file asks for {in_full} products in full precision, so their weights are made float each time, which is"
                f" slow. precision {precision.name} multiplies them in {precision.name}."
            )
        if precision.fell_back:
            notes.append(f"Warning: {precision.why}")
        return notes
    notes = []
    if precision.fell_back:
        notes.append(f"Warning: precision {precision.name} runs instead of {precision.wanted}: {precision.why}")
    elif precision.wanted == "auto":
        notes.append(f"Precision {precision.name}: {precision.why}")
    if held and precision.form not in (None, PACKED):
        notes.append(
            f"Warning: the file has {held}, which are quantized again to {precision.form}. That is less exact than making"
            f" {precision.form} from a bf16 file; precision auto keeps the weights as they are."
        )
    elif held and precision.form is None:
        notes.append(
            f"The file has {held}; they were made {precision.name} while loading, which restores no precision."
        )
    return notes
