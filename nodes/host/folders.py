"""Which files the combos offer, and from a combo's value to a path inside ComfyUI's folders.

A value that is not offered is refused, so no path from a request ever reaches the file system unchecked.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import folder_paths

from ...qwen_edit.attention_auto import TUNED_FILE
from ...qwen_edit.checkpoints import is_edit_folder
from ...qwen_edit.errors import INPUT
from ...qwen_edit.gguf import SUFFIX as GGUF
from ...qwen_edit.gguf_encoder import is_vision_name, vision_files

PACK = Path(__file__).resolve().parents[2]
DEMO = PACK / "demo_model"
DEMO_NAME = "demo (small model of this pack)"
FROM_MODEL = "from the model folder"
NONE = "none"
FOLDER_PREFIX = "folder: "
CHECKPOINT_PREFIX = "checkpoint: "
DEMO_LORA_PREFIX = "demo: "
GGUF_MODELS = ("diffusion_models", "unet_gguf")  # the second key of each is ComfyUI-GGUF's
GGUF_TEXT_ENCODERS = ("text_encoders", "clip_gguf")


def models() -> list[str]:
    """Diffusers folders first, then single files (safetensors, GGUF) with those that look like Qwen-Image-Edit first, those of
    models/checkpoints (transformer, text encoder and VAE in one) in the same order, the demo last."""
    files = _edits_first([*_safetensors("diffusion_models"), *_gguf_files(GGUF_MODELS)])
    checkpoints = [CHECKPOINT_PREFIX + name for name in _edits_first(_safetensors("checkpoints"))]
    demo = [DEMO_NAME] if is_edit_folder(DEMO) else []
    return [FOLDER_PREFIX + name for name in _edit_folders()] + files + checkpoints + demo


def _safetensors(folder: str) -> list[str]:
    return [f for f in folder_paths.get_filename_list(folder) if f.lower().endswith((".safetensors", ".sft"))]


def _edits_first(files: list[str]) -> list[str]:
    return sorted(files, key=lambda name: (not _looks_like_edit(name), name.lower()))


def default_model() -> str | None:
    """Real weights when there are any, else the demo."""
    offered = models()
    real = [m for m in offered if m.startswith(FOLDER_PREFIX) or _looks_like_edit(m)]
    return next(iter(real or offered[-1:]), None)


def _looks_like_edit(name: str) -> bool:
    lower = os.path.basename(name).lower()
    return "qwen" in lower and "edit" in lower


def text_encoders() -> list[str]:
    """What is in a GGUF file as well, but for the second file that such a text encoder sees pictures with."""
    in_gguf = [name for name in _gguf_files(GGUF_TEXT_ENCODERS) if not is_vision_name(name)]
    own = folder_paths.get_filename_list("text_encoders")
    return [FROM_MODEL, *own, *(name for name in in_gguf if name not in own), NONE]


def vaes() -> list[str]:
    return [FROM_MODEL, *folder_paths.get_filename_list("vae")]


def loras() -> list[str]:
    demo = sorted(p.stem for p in (DEMO / "loras").glob("*.safetensors"))
    return [NONE, *folder_paths.get_filename_list("loras"), *(DEMO_LORA_PREFIX + stem for stem in demo)]


def model_path(name: str) -> Path:
    """The folder or file of a value of ``models``.

    Raises:
        ValueError: it is not one of them.
    """
    _check("model", name, models())
    if name == DEMO_NAME:
        return DEMO
    if name.startswith(FOLDER_PREFIX):
        return _edit_folders()[name.removeprefix(FOLDER_PREFIX)]
    if name.startswith(CHECKPOINT_PREFIX):
        return _file("checkpoints", name.removeprefix(CHECKPOINT_PREFIX))
    if name.lower().endswith(GGUF):
        return _gguf_files(GGUF_MODELS)[name]
    return _file("diffusion_models", name)


def text_encoder_path(name: str) -> Path:
    _check("text encoder", name, text_encoders()[1:-1])
    if name.lower().endswith(GGUF):
        return _gguf_files(GGUF_TEXT_ENCODERS)[name]
    return _file("text_encoders", name)


def vae_path(name: str) -> Path:
    _check("VAE", name, vaes()[1:])
    return _file("vae", name)


def lora_path(name: str) -> Path:
    _check("LoRA", name, loras()[1:])
    if name.startswith(DEMO_LORA_PREFIX):
        return DEMO / "loras" / f"{name.removeprefix(DEMO_LORA_PREFIX)}.safetensors"
    return _file("loras", name)


def fingerprint_of(path_of: Callable[[str], Path], names: Iterable[str]) -> tuple:
    """Changes when a file behind one of the names does; a name that is refused counts as itself."""
    result = []
    for name in names:
        try:
            path = path_of(name)
            files = sorted(path.glob("*/*")) if path.is_dir() else [path]
            if path.suffix.lower() == GGUF:
                files += vision_files(path)  # of a text encoder
            stats = [file.stat() for file in files]
            result.append((name, *((stat.st_size, stat.st_mtime_ns) for stat in stats)))
        except (ValueError, OSError):  # execute reports it
            result.append((name,))
    return tuple(result)


def _check(what: str, name: str, offered: list[str]) -> None:
    if name not in offered:
        raise ValueError(f"{INPUT} The {what} {name!r} is not in ComfyUI's folders. Refresh the list and choose again.")


def _file(folder: str, name: str) -> Path:
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise ValueError(
            f"{INPUT} {name!r} is no longer in ComfyUI's {folder} folder. Refresh the list and choose again."
        )
    return Path(path)


def _edit_folders() -> dict[str, Path]:
    """Name -> path of every Qwen-Image-Edit folder directly below ComfyUI's diffusers folders or one level deeper."""
    found = {}
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        if root.is_dir():
            for index in sorted((*root.glob("*/model_index.json"), *root.glob("*/*/model_index.json"))):
                if is_edit_folder(index.parent):
                    found.setdefault(index.parent.relative_to(root).as_posix(), index.parent)
    return found


def _gguf_files(keys: Iterable[str]) -> dict[str, Path]:
    """Name -> path of every GGUF file in the folders of these keys, as far as ComfyUI has the keys. ComfyUI's own lists
    leave such files out, and what they hold is for all loaders, so it is not changed here."""
    keys = [key for key in keys if key in folder_paths.folder_names_and_paths]
    found = {}
    for root in dict.fromkeys(root for key in keys for root in folder_paths.get_folder_paths(key)):
        names, _ = folder_paths.recursive_search(root, [".git"])
        for name in folder_paths.filter_files_extensions(names, [GGUF]):
            found.setdefault(name, Path(root, name))
    return found


def tuned_attention() -> Path:
    """Where scripts/tune_attention.py leaves what it found; the file need not exist."""
    return Path(folder_paths.get_user_directory()) / TUNED_FILE
