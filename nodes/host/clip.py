"""The text encoder of a diffusers folder as ComfyUI's CLIP."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ...qwen_edit.checkpoints import read_config, read_header, weight_files
from ...qwen_edit.errors import INPUT, WEIGHTS
from ...qwen_edit.pictures import to_pil
from ...qwen_edit.text_encoder import FolderTextEncoder, PreparedPictures, encode
from ...qwen_edit.values import check_has
from .memory import ShellPatcher, still_loaded

SAVED_CLIP_PREFIX = "qwen25_7b.transformer."  # of the names that ComfyUI's CLIPSave writes
OFFLOAD_AFTER_USE = "qwen_edit_offload_after_use"  # attachment on the patcher: leave the card after encoding


class FolderTokenizer:
    """ComfyUI's tokenizer interface over the folder's tokenizer and processor."""

    def __init__(self, encoder: FolderTextEncoder):
        self.encoder = encoder

    def tokenize_with_weights(self, text, return_word_ids=False, llama_template=None, images=(), **kwargs):
        """One prompt. ``images``: IMAGEs ``[1, H, W, C]``, float in [0, 1], already at the encoder's size, or what
        ``prepare`` made of them."""
        pictures = images if isinstance(images, PreparedPictures) else self.prepare(images)
        return self.encoder.tokenize(text, pictures, llama_template)

    def prepare(self, images: Sequence[torch.Tensor]) -> PreparedPictures | None:
        return self.encoder.prepare([to_pil(image[0, ..., :3]) for image in images])

    def state_dict(self):
        return {}


class FolderTextModel(torch.nn.Module):
    """The held module: ComfyUI's text model interface, and a shell (see ``memory.py``)."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        super().__init__()
        self.folder, self.dtype = folder, dtype
        self.device: torch.device | None = None
        self.transformer: Any = None  # Qwen2_5_VLForConditionalGeneration once filled

    def reset_clip_options(self):
        pass

    def set_clip_options(self, options):
        pass

    def encode_token_weights(self, inputs):
        return encode(self.transformer, inputs), None, {}

    @property
    def is_empty(self) -> bool:
        return self.transformer is None

    def fill(self, device: torch.device) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            self.folder / "text_encoder",
            dtype=self.dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        transformer, report = loaded
        # The language head is not run, and is tied to the embedding in small models.
        missing = sorted(name for name in report["missing_keys"] if not name.startswith("lm_head"))
        if missing:
            raise ValueError(
                f"{WEIGHTS} {self.folder.name}/text_encoder: {len(missing)} tensors are missing ({', '.join(missing[:5])})."
                " Download the folder again."
            )
        self.transformer = transformer.eval().requires_grad_(False)

    def empty(self) -> None:
        self.transformer = None


def load_clip(folder: Path, dtype: torch.dtype | None = None, keep_on_card: bool = False) -> comfy.sd.CLIP:
    """A CLIP whose weights are read when it first encodes.

    Args:
        keep_on_card: what ComfyUI unloads stays where it is, as with its --highvram.
        dtype: None: what ComfyUI chooses for text encoders on this machine, float32 on the CPU.

    Raises:
        ValueError: weights are missing or damaged.
    """
    if dtype is None:
        on_cpu = comfy.model_management.is_device_cpu(comfy.model_management.text_encoder_device())
        dtype = torch.float32 if on_cpu else torch.bfloat16
    read_config(folder / "text_encoder")
    files = weight_files(folder / "text_encoder")
    weights = sum(_elements(path) for path in files)

    try:
        tokenizer = FolderTokenizer(FolderTextEncoder(folder))
    except (OSError, ValueError) as e:  # transformers' own message speaks of its hub
        raise ValueError(
            f"{WEIGHTS} {folder.name}: tokenizer or processor can't be read. Download the folder again."
        ) from e
    return shell_clip(FolderTextModel(folder, dtype), tokenizer, weights * dtype.itemsize, keep_on_card)


def load_saved_clip(path: Path, embeddings: list[str], disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """The text encoder that CLIPSave wrote, which ``comfy.sd.load_clip`` takes for CLIP-L because of the prefix."""
    state, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    state = comfy.utils.state_dict_prefix_replace(state, {SAVED_CLIP_PREFIX: ""})
    state, _ = comfy.utils.convert_old_quants(state, metadata=metadata)
    clip = comfy.sd.load_text_encoder_state_dicts(
        [state],
        embedding_directory=embeddings,
        clip_type=comfy.sd.CLIPType.QWEN_IMAGE,
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_saved_clip_patcher, (path, embeddings))
    return clip


def _saved_clip_patcher(path: Path, embeddings: list[str], disable_dynamic: bool = False):
    return load_saved_clip(path, embeddings, disable_dynamic).patcher


def shell_clip(
    model: torch.nn.Module, tokenizer: Any, size: int, keep_on_card: bool, patcher: type[ShellPatcher] = ShellPatcher
) -> comfy.sd.CLIP:
    """The CLIP of a shell (see ``memory.py``) of ``size`` bytes."""
    device = comfy.model_management.text_encoder_device()
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model, clip.tokenizer = model, tokenizer
    clip.patcher = patcher(
        model,
        load_device=device,
        offload_device=device if keep_on_card else comfy.model_management.text_encoder_offload_device(),
        size=size,
    )
    clip.patcher.is_clip = True
    clip.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    clip.layer_idx = None
    clip.use_clip_schedule = False
    clip.apply_hooks_to_conds = None
    clip.tokenizer_options = {}
    return clip


def shared_pictures(clip: comfy.sd.CLIP, images: Sequence[torch.Tensor]) -> Any:
    """``images`` for ``clip.tokenize``, such that prompts tokenized with the same result share the work on them."""
    return (clip.tokenizer.prepare(images) or ()) if isinstance(clip.tokenizer, FolderTokenizer) else images


@contextmanager
def loaded_once(clip: comfy.sd.CLIP) -> Iterator[None]:
    """While this is open, at most the first prompt asks ComfyUI to load the encoder, which costs as much as encoding one.

    Nothing else may use the card meanwhile. Encoders with hooks load differently for each prompt and are left alone.
    """
    if "load_model" in vars(clip) or clip.use_clip_schedule or clip.patcher.forced_hooks:
        yield
        return
    load, loaded = clip.load_model, []

    def load_first_time(tokens={}):  # noqa: B006 (ComfyUI's signature)
        if not loaded:
            loaded.append(clip.patcher if still_loaded(clip.patcher) else load(tokens))
        return loaded[0]

    clip.load_model = load_first_time
    try:
        yield
    finally:
        del clip.load_model


def require_clip(clip) -> None:
    """Raise a ValueError unless it is a CLIP of any loader's."""
    if clip is None:
        raise ValueError(
            f"{INPUT} There is no CLIP: its loader loads no text encoder. Choose one there, or connect another loader's CLIP."
        )
    check_has("clip", clip, "tokenize", "a CLIP")


def leave_card(clip: comfy.sd.CLIP) -> bool:
    """Unload the text encoder if its loader asked for that; whether it did."""
    if clip.patcher.get_attachment(OFFLOAD_AFTER_USE) is None:
        return False
    comfy.model_management.unload_model_and_clones(clip.patcher)
    return True


def _elements(path: Path) -> int:
    return sum(torch.Size(entry["shape"]).numel() for entry in read_header(path).values())
