"""What a weights file or folder is, decided from headers before a byte of weights is read.

Two forms are understood: a diffusers folder (``model_index.json`` of ``QwenImageEditPlusPipeline`` or
``QwenImageEditPipeline``, sharded or not) and one safetensors or GGUF file holding the transformer, with or without the
prefix ``model.diffusion_model.`` (the form ComfyUI users have). Both use diffusers' tensor names.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .blocks import BLOCK_TYPES, BlockType, dequantize, packed_shape
from .errors import WEIGHTS
from .gguf import SUFFIX, guess_version, read_gguf_header
from .packed import PackedLinear
from .quantize import StaysInRam, in_its_form, is_modulation
from .reading import Stored, mapped, read_ahead

PIPELINES = ("QwenImageEditPlusPipeline", "QwenImageEditPipeline")
FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Present in ComfyUI's single files of 2511 (zero_cond_t); repackaged files may lack it.
ZERO_COND_MARKER = "__index_timestep_zero__"
SINGLE_FILE_PREFIX = "model.diffusion_model."
# safetensors itself refuses headers over 100 MB; a 60-block transformer's is under 1 MB.
MAX_HEADER_BYTES = 100_000_000

Progress = Callable[[int, int], None]  # bytes read so far, bytes in all


@dataclass(frozen=True)
class TransformerSource:
    """Where the transformer's weights lie and what they are.

    ``config`` are the arguments of diffusers' ``QwenImageTransformer2DModel``; ``tensors`` maps each of its
    tensor names to (file, name in the file); ``dtype`` is the dtype that most bytes have on disk.
    """

    label: str
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[Path, str]]
    dtype: torch.dtype
    fingerprint: tuple
    blocks: Mapping[str, BlockType] = field(default_factory=dict)
    version_note: str | None = None


def fingerprint(paths: Iterable[Path]) -> tuple:
    """Changes when any of the files is replaced: name, size and modification time."""
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(paths))


def read_header(path: Path) -> dict[str, dict]:
    """Tensor name -> {"dtype", "shape", "data_offsets"}, without reading weights; offsets are counted from the file's start.

    Files whose names end in .gguf are read as such, see ``gguf.py``.

    Raises:
        ValueError: not a safetensors (or GGUF) file, with the likely cause, or a damaged one.
    """
    size = path.stat().st_size
    is_gguf = path.suffix.lower() == SUFFIX
    with path.open("rb") as file:
        start = file.read(512)
    cause = _no_weights(start) or (None if is_gguf else _not_safetensors(start, size))
    if cause is not None:
        kind = "GGUF" if is_gguf else "safetensors"
        raise ValueError(f"{WEIGHTS} {_shown(path)} ({size:,} bytes) is not a {kind} file: {cause}")
    if is_gguf:
        return read_gguf_header(path)[0]
    try:
        # safetensors checks offsets, overlaps and trailing bytes; its own header gives shapes without reading.
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as e:
        raise ValueError(
            f"{WEIGHTS} {_shown(path)} ({size:,} bytes) is damaged or was not downloaded to its end ({e}). Download it again."
        ) from e
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for entry in header.values():
        entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
    return header


def _shown(path: Path) -> str:
    """The file's name, with its folders when it is part of a diffusers folder."""
    return "/".join(path.parts[-3:]) if (path.parent.parent / "model_index.json").is_file() else path.name


def _no_weights(start: bytes) -> str | None:
    text = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer. Run 'git lfs pull', or download the file itself."
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, probably an error page saved by the download. Download the file again."
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "it is a zip or pickle file. This pack loads safetensors and GGUF only, because a pickle can run code."
    return None


def _not_safetensors(start: bytes, size: int) -> str | None:
    if start.startswith(b"GGUF"):
        return "it is a GGUF file. This pack takes those as transformers, under names that end in .gguf."
    if size < 10:
        return "it is empty or cut off. Download it again."
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER_BYTES or start[8:9] != b"{":
        return "its first bytes are no safetensors header. It is another kind of file, or damaged."
    if length + 8 > size:
        return "it ends inside its own header, so the download was cut off. Download it again."
    return None


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
        zero_cond_t: True for 2511, False for 2509 and the first Qwen-Image-Edit; None: by the marker key, or in a GGUF
            file without it by what the file calls itself.

    Raises:
        ValueError: another architecture, a quantized file, or a damaged one.
    """
    header = read_header(path)
    prefix = SINGLE_FILE_PREFIX if any(k.startswith(SINGLE_FILE_PREFIX) for k in header) else ""
    names = {k.removeprefix(prefix): k for k in header if k.startswith(prefix)}
    _refuse_other_architectures(path, header, names)
    blocks = {n: BLOCK_TYPES[t] for n, k in names.items() if (t := header[k]["dtype"]) in BLOCK_TYPES}
    quantized = [
        n for n in names if n not in blocks and header[names[n]]["dtype"] not in FLOAT_DTYPES and n != ZERO_COND_MARKER
    ]
    if quantized:
        raise ValueError(
            f"{WEIGHTS} {path.name} holds {len(quantized)} tensors in {header[names[quantized[0]]]['dtype']}. This"
            " version loads bf16, fp16 and fp32 files; use ComfyUI's own loader for quantized ones."
        )
    marked = names.pop(ZERO_COND_MARKER, None) is not None
    note = None
    if zero_cond_t is None and not marked and path.suffix.lower() == SUFFIX:
        marked, note = guess_version(path)
    return TransformerSource(
        label=path.stem,
        config=_config_from_shapes(header, names) | {"zero_cond_t": marked if zero_cond_t is None else zero_cond_t},
        tensors={name: (path, stored) for name, stored in names.items()},
        dtype=_main_dtype([path]),
        fingerprint=fingerprint([path]),
        blocks=blocks,
        version_note=note,
    )


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
    headers = {path: read_header(path) for path in {path for path, _ in source.tensors.values()}}
    return sum(
        2 * math.prod(headers[path][stored]["shape"])
        for name, (path, stored) in source.tensors.items()
        if name.startswith("transformer_blocks.") and not is_modulation(name)
    )


def _refuse_other_architectures(path: Path, header: Mapping[str, dict], names: Mapping[str, str]) -> None:
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


def _config_from_shapes(header: Mapping[str, dict], names: Mapping[str, str]) -> dict[str, Any]:
    def shape(name: str) -> list[int]:
        return header[names[name]]["shape"]

    inner, in_channels = shape("img_in.weight")
    head_dim = shape("transformer_blocks.0.attn.norm_q.weight")[0]
    blocks = {int(n.split(".")[1]) for n in names if n.startswith("transformer_blocks.")}
    if head_dim != 128:
        raise ValueError(
            f"{WEIGHTS} The attention heads have {head_dim} channels, Qwen-Image-Edit's 128. How positions are split over"
            " other heads is not in a single file; use a diffusers folder."
        )
    return {
        "num_layers": max(blocks) + 1,
        "in_channels": in_channels,
        "out_channels": shape("proj_out.weight")[0] // 4,
        "attention_head_dim": head_dim,
        "num_attention_heads": inner // head_dim,
        "joint_attention_dim": shape("txt_in.weight")[1],
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


def fill(
    model: torch.nn.Module,
    source: TransformerSource,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    on_ram: Callable[[torch.Tensor], None] | None = None,
) -> None:
    """Read the weights of ``source`` into ``model`` (on meta), converted to ``dtype`` on ``device``, and there into the
    form of their modules (see ``quantize``), one tensor after the other. ``on_ram`` gets each one that stays in RAM.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape (their count and the first five).
    """
    check_tensors(model, source)
    wanted = _stored(model, source)
    total, done = sum(s.nbytes for s in wanted.values()), 0
    state = {}
    for name, tensor in mapped(wanted) if device.type == "cpu" else read_ahead(wanted, pinned=device.type == "cuda"):
        path, _, parameter = name.rpartition(".")
        module = model.get_submodule(path)
        there = tensor if wanted[name].keep else tensor.to(device)
        if name not in source.blocks:
            there = there.to(dtype)
        elif not isinstance(module, PackedLinear):
            floats = dequantize(there.to(device), source.blocks[name], dtype)  # on the card, where it is fast
            there = floats.view(getattr(module, parameter).shape).to(there.device)
        state[name] = in_its_form(module, parameter, there)
        if wanted[name].keep and on_ram is not None:
            on_ram(there)
        done += wanted[name].nbytes
        if progress is not None:
            progress(done, total)
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False)


def _stored(model: torch.nn.Module, source: TransformerSource) -> dict[str, Stored]:
    """By the model's names, in the order in which the tensors lie in the files."""
    headers = {path: read_header(path) for path in {path for path, _ in source.tensors.values()}}
    found = {}
    for name, (path, key) in source.tensors.items():
        entry = headers[path][key]
        keep = isinstance(model.get_submodule(name.rpartition(".")[0]), StaysInRam)
        kind = source.blocks.get(name)
        shape = tuple(entry["shape"]) if kind is None else packed_shape(entry["shape"], kind)
        dtype = torch.uint8 if kind is not None else FLOAT_DTYPES[entry["dtype"]]
        found[name] = Stored(key, path, entry["data_offsets"][0], shape, dtype, keep)
    return dict(sorted(found.items(), key=lambda item: (item[1].path, item[1].offset)))


def check_tensors(model: torch.nn.Module, source: TransformerSource) -> None:
    """Raise as ``fill`` would, from the headers alone, so that nothing is loaded for a file that can't be used.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            expected[f"{name}.weight"] = torch.Size((module.out_features, module.in_features))
    check_names(source.label, expected.keys(), source.tensors.keys())
    headers = {path: read_header(path) for path in {path for path, _ in source.tensors.values()}}
    for name, (path, stored) in source.tensors.items():
        _check_shape(source.label, name, headers[path][stored]["shape"], expected[name])


def _check_shape(label: str, name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
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
