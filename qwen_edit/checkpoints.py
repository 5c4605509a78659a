"""What a weights file or folder is, decided from headers before a byte of weights is read.

Two forms are understood: a diffusers folder (``model_index.json`` of ``QwenImageEditPlusPipeline`` or
``QwenImageEditPipeline``, sharded or not) and one safetensors or GGUF file holding the transformer, under a prefix or not,
alone or with a text encoder and a VAE, quantized or not (the forms that ComfyUI users have; see ``stored_formats`` and
``gguf``). Both use diffusers' tensor names.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .blocks import BLOCK_TYPES, BlockType
from .errors import WEIGHTS
from .gguf import SUFFIX
from .headers import read_header, read_metadata
from .packed import PackedLinear
from .quantize import MISSING, is_modulation
from .stored_formats import StoredWeight, take_stored_weights, unpacked

PIPELINES = ("QwenImageEditPlusPipeline", "QwenImageEditPipeline")
FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPES = FLOAT_DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
}
# Present in ComfyUI's single files of 2511 (zero_cond_t); repackaged files may lack it.
ZERO_COND_MARKER = "__index_timestep_zero__"
# This model alone has it at the top of its names, so what stands before it is the file's prefix.
TOP_LEVEL_NAME = "txt_norm.weight"


@dataclass(frozen=True)
class TransformerSource:
    """Where the transformer's weights lie and what they are.

    ``config`` are the arguments of diffusers' ``QwenImageTransformer2DModel``; ``tensors`` maps each of its
    tensor names to (file, name in the file); ``dtype`` is the dtype that most bytes have on disk; ``stored`` are those
    of the tensors that are quantized, ``blocks`` those in ggml's formats; ``version_by`` says how 2511 (``zero_cond_t``) was told from 2509, None: nothing
    did.
    """

    label: str
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[Path, str]]
    dtype: torch.dtype
    fingerprint: tuple
    stored: Mapping[str, StoredWeight] = field(default_factory=dict)
    blocks: Mapping[str, BlockType] = field(default_factory=dict)
    version_by: str | None = "its configuration"


def fingerprint(paths: Iterable[Path]) -> tuple:
    """Changes when any of the files is replaced: name, size and modification time."""
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(paths))


def is_edit_folder(folder: Path) -> bool:
    """Whether the folder's model_index.json names a Qwen-Image-Edit pipeline. Never raises."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and index.get("_class_name") in PIPELINES


def transformer_from_folder(folder: Path) -> TransformerSource:
    """The transformer of a diffusers folder.

    Raises:
        ValueError: the folder is not a Qwen-Image-Edit pipeline, is incomplete, or a file is damaged.
    """
    if not is_edit_folder(folder):
        raise ValueError(f"{WEIGHTS} {folder.name}: model_index.json does not name {' or '.join(PIPELINES)}.")
    component = folder / "transformer"
    config = read_config(component)
    files = weight_files(component)
    header = {name: (path, name) for path in files for name in read_header(path)}
    return TransformerSource(
        label=folder.name,
        config={k: v for k, v in config.items() if not k.startswith("_")},
        tensors=header,
        dtype=_main_dtype(files),
        fingerprint=fingerprint(files),
    )


def transformer_from_file(path: Path, zero_cond_t: bool | None = None) -> TransformerSource:
    """The transformer in one safetensors or GGUF file; its configuration is read off the tensor shapes.

    Args:
        zero_cond_t: True for 2511, False for 2509 and the first Qwen-Image-Edit; None: by the file, see ``_version``.

    Raises:
        ValueError: another architecture, a format that is not understood, or a damaged file.
    """
    header, metadata = read_header(path), read_metadata(path)
    prefix = next((k.removesuffix(TOP_LEVEL_NAME) for k in header if k.endswith(TOP_LEVEL_NAME)), "")
    names = {k.removeprefix(prefix): k for k in header if k.startswith(prefix)}
    _refuse_other_architectures(path, header, names)
    marked = names.pop(ZERO_COND_MARKER, None) is not None
    version, version_by = _version(path, marked, metadata)
    blocks = {n: BLOCK_TYPES[t] for n, k in names.items() if (t := header[k]["dtype"]) in BLOCK_TYPES}
    stored = {} if path.suffix.lower() == SUFFIX else take_stored_weights(path, header, names, metadata)
    if stored and MISSING is not None:
        raise ValueError(f"{WEIGHTS} {path.name} is quantized, but {MISSING}. Update ComfyUI, which brings it.")
    return TransformerSource(
        label=path.stem,
        config=_config_from_shapes(path, header, names, stored)
        | {"zero_cond_t": version if zero_cond_t is None else zero_cond_t},
        tensors={name: (path, key) for name, key in names.items()},
        dtype=_main_dtype([path]),
        fingerprint=fingerprint([path]),
        stored=stored,
        blocks=blocks,
        version_by=version_by if zero_cond_t is None else "model_version",
    )


def _version(path: Path, marked: bool, metadata: Mapping[str, str]) -> tuple[bool, str | None]:
    """Whether a single file is 2511, and what says so. The weights of 2511 and 2509 do not differ in shape, so it is the
    mark, else the one of the two numbers in the file's metadata, else in its name; else it is taken for 2509, as ComfyUI
    does."""
    if marked:
        return True, "the file's mark"
    notes = " ".join(str(v) for k, v in metadata.items() if k not in ("prompt", "workflow"))  # those name many files
    for text, what in ((notes, "the file's metadata"), (path.name, "the file's name")):
        found = {number for number in ("2511", "2509") if re.search(rf"(?<!\d){number}(?!\d)", text)}  # not in a date
        if len(found) == 1:
            return found == {"2511"}, what
    return False, None


def read_config(component: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON file of one component of a diffusers folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        config = json.loads((component / name).read_text(encoding="utf-8"))
        if isinstance(config, dict):
            return config
        problem = "it is no JSON object"
    except (OSError, ValueError) as e:
        problem = str(e)
    raise ValueError(
        f"{WEIGHTS} {component.parent.name}/{component.name}/{name} can't be used ({problem}). Download the folder"
        " again."
    )


def weight_files(component: Path) -> list[Path]:
    """The safetensors files of one component of a diffusers folder.

    Raises:
        ValueError: none is there, or the index names one that is missing.
    """
    indices = sorted(component.glob("*.safetensors.index.json"))
    if indices:
        weight_map = read_config(component, indices[0].name).get("weight_map", {})
        files = [component / name for name in sorted(set(weight_map.values()))]
        outside = [f.name for f in files if f.parent != component]
        if outside:
            raise ValueError(
                f"{WEIGHTS} {component.parent.name}/{component.name}: its index names files of other folders."
            )
    else:
        files = sorted(component.glob("*.safetensors"))
    missing = [f.name for f in files if not f.is_file()]
    if missing or not files:
        raise ValueError(
            f"{WEIGHTS} {component.parent.name}/{component.name} lacks {', '.join(missing) or 'its .safetensors files'}."
            " Download the folder again."
        )
    return files


def block_bytes(source: TransformerSource) -> int:
    """Size in bf16 of the blocks' weights, those of the modulation left out."""
    headers = read_headers(source)
    return sum(
        2 * math.prod(unpacked(source.stored.get(name), headers[path][key]["shape"]))
        for name, (path, key) in source.tensors.items()
        if name.startswith("transformer_blocks.") and not is_modulation(name)
    )


def _refuse_other_architectures(path: Path, header: Mapping[str, Mapping], names: Mapping[str, str]) -> None:
    wanted = ("img_in.weight", "txt_in.weight", "txt_norm.weight", "transformer_blocks.0.img_mod.1.weight")
    if all(name in names for name in wanted):
        return
    found = next((label for label, key in _SIGNATURES if any(key in name for name in header)), None)
    raise ValueError(
        f"{WEIGHTS} {path.name}: found {found or f'an unknown architecture ({len(header)} tensors)'}, this loader needs"
        " the transformer of Qwen-Image-Edit."
    )


# A substring of tensor names that tells the models apart which people keep beside this one.
_SIGNATURES = (
    ("a LoRA (use a LoRA loader)", "lora_"),
    ("FLUX or another model with its blocks", "double_blocks."),
    ("Stable Diffusion (a U-Net)", "input_blocks."),
    ("Wan", "blocks.0.cross_attn"),
    ("Z-Image or Lumina", "noise_refiner"),
    ("SD3", "joint_blocks."),
    ("a VAE", "decoder.conv"),
    ("a VAE", "decoder.middle"),
    ("a Qwen2.5-VL text encoder", "visual.patch_embed"),
    ("a language model", "layers.0.self_attn"),
)


def _config_from_shapes(
    path: Path, header: Mapping[str, Mapping], names: Mapping[str, str], stored: Mapping[str, StoredWeight]
) -> dict[str, Any]:
    def shape(name: str, dimensions: int) -> list[int]:
        check_names(path.name, [name], [name] if name in names else [])
        found = unpacked(stored.get(name), header[names[name]]["shape"])
        if len(found) != dimensions or 0 in found:
            raise ValueError(f"{WEIGHTS} {path.name}: {name} is {found}, which this model's never is. It is damaged.")
        return found

    inner, in_channels = shape("img_in.weight", 2)
    (head_dim,) = shape("transformer_blocks.0.attn.norm_q.weight", 1)
    blocks = {name.split(".")[1] for name in names if name.startswith("transformer_blocks.")}
    # before a model is built with as many blocks as a name says
    check_names(
        path.name, {f"transformer_blocks.{i}" for i in range(len(blocks))}, (f"transformer_blocks.{b}" for b in blocks)
    )
    if head_dim != 128:
        raise ValueError(
            f"{WEIGHTS} {path.name}: the attention heads have {head_dim} channels, Qwen-Image-Edit's 128. How positions are split over"
            " other heads is not in a single file; use a diffusers folder."
        )
    return {
        "num_layers": len(blocks),
        "in_channels": in_channels,
        "out_channels": shape("proj_out.weight", 2)[0] // 4,
        "attention_head_dim": head_dim,
        "num_attention_heads": inner // head_dim,
        "joint_attention_dim": shape("txt_in.weight", 2)[1],
    }


def _main_dtype(files: Iterable[Path]) -> torch.dtype:
    counted: dict[torch.dtype, int] = {}
    for path in files:
        for entry in read_header(path).values():
            begin, end = entry["data_offsets"]
            dtype = FLOAT_DTYPES.get(entry["dtype"])
            if dtype is not None:
                counted[dtype] = counted.get(dtype, 0) + end - begin
    return max(counted, key=lambda d: counted[d], default=torch.bfloat16)


def read_headers(source: TransformerSource) -> dict[Path, Mapping[str, Mapping]]:
    """Those of the files that the weights lie in, see ``read_header``."""
    return {path: read_header(path) for path in {path for path, _ in source.tensors.values()}}


def check_tensors(
    model: torch.nn.Module, source: TransformerSource, headers: Mapping[Path, Mapping[str, Mapping]] | None = None
) -> None:
    """Raise as ``filling.fill`` would, from the headers alone, so that nothing is loaded for a file that can't be used.

    Args:
        headers: of the source's files, if they have been read already.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            expected[f"{name}.weight"] = torch.Size((module.out_features, module.in_features))
    check_names(source.label, expected.keys(), source.tensors.keys())
    headers = headers or read_headers(source)
    for name, (path, key) in source.tensors.items():
        weight, shape = source.stored.get(name), expected[name]
        wanted = shape if weight is None else weight.stored_shape(shape)
        check_shape(source.label, name, headers[path][key]["shape"], wanted)


def check_shape(label: str, name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    if list(found) != list(wanted):
        raise ValueError(
            f"{WEIGHTS} {label}: {name} is {list(found)}, the model needs {list(wanted)}. The configuration and the"
            " weights do not belong together."
        )


def check_names(label: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    """Raise a ValueError that counts missing and unexpected tensor names and shows the first five of each."""
    wanted, found = set(wanted), set(found)
    problems = [
        f"{len(names)} tensors are {what} ({', '.join(sorted(names)[:5])}{', …' if len(names) > 5 else ''})"
        for what, names in (("missing", wanted - found), ("unexpected", found - wanted))
        if names
    ]
    if problems:
        raise ValueError(f"{WEIGHTS} {label}: {' and '.join(problems)}. The file is incomplete or of another model.")
