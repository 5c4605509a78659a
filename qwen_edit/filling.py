"""The weights of a file or folder into a model: each tensor on its device, in the form in which its module keeps it."""

from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .blocks import BLOCK_TYPES, dequantize, packed_shape
from .checkpoints import DTYPES, TransformerSource, check_tensors, read_headers
from .file_weights import FileWeights
from .host_memory import Lock, page_lock
from .packed import PackedLinear
from .quantize import StaysInRam, in_its_form
from .reading import Stored, mapped, read_ahead
from .stored_formats import SMOOTHING
from .stored_weights import for_module

BLOCKS = "transformer_blocks"
WEIGHT = ""  # beside the names of its scales

Progress = Callable[[int, int], None]  # bytes read so far, bytes in all


def fill(
    model: torch.nn.Module,
    source: TransformerSource,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    on_block: Callable[[int], None] | None = None,
    lock: Lock = page_lock,
) -> FileWeights:
    """Read the weights of ``source`` into ``model`` (on meta), converted to ``dtype`` on ``device``, and there into the
    form of their modules (see ``quantize``), one tensor after the other. Those that stay in RAM are the file's own pages,
    where they need no conversion; what is returned reads them when they are used.

    Args:
        on_block: called with a block's index as soon as the block has all its weights, and may move them.
        lock: see ``read_ahead``.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape (their count and the first five).
    """
    headers = read_headers(source)
    check_tensors(model, source, headers)
    modules = dict[str, Any](model.named_modules())
    wanted, scales = places(source, headers)
    total, done = sum(s.nbytes for s in wanted.values()), 0
    left = Counter(_block_of(name) for name in wanted)
    ready: dict[int | None, list[tuple[Any, str, torch.Tensor]]] = defaultdict(list)
    read: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)  # of a weight and its scales, what is there already
    in_file = FileWeights(lock)
    with closing(_tensors(modules, _with_scales(wanted, scales), device, lock)) as tensors:
        for (name, what), tensor in tensors:
            read[name][what] = tensor
            if len(read[name]) <= len(scales.get(name, ())):
                continue
            beside = read.pop(name)
            raw = beside.pop(WEIGHT)
            owner, _, parameter = name.rpartition(".")
            module = modules[owner]
            there, stays = raw, isinstance(module, StaysInRam) and parameter == "weight"
            if name in source.stored:
                there = for_module(module, source.stored[name], raw, beside, dtype)
            elif name not in source.blocks:
                # what stays is made the model's dtype where it is used, unless a patch in its own would be less exact
                there = raw if stays and raw.itemsize >= dtype.itemsize else raw.to(dtype)
            elif not isinstance(module, PackedLinear):
                floats = dequantize(raw.to(device), source.blocks[name], dtype)  # on the card, where it is fast
                there = floats.view(getattr(module, parameter).shape).to(raw.device)
            there = in_its_form(module, parameter, there)
            if stays and device.type != "cpu":  # else the pages are where they are needed
                in_file.add(module, there, raw, wanted[name])
            block = _block_of(name)
            ready[block].append((module, parameter, there))
            left[block] -= 1
            if block is not None and left[block] == 0:
                _put(ready.pop(block))
                if on_block is not None:
                    on_block(block)
            done += wanted[name].nbytes
            if progress is not None:
                progress(done, total)
    _put(ready[None])
    return in_file


def places(
    source: TransformerSource, headers: Mapping[Path, Mapping[str, Mapping]]
) -> tuple[dict[str, Stored], dict[str, dict[str, Stored]]]:
    """By the model's names: the tensors, in the order in which they lie in the files, and the scales of the quantized."""

    def place(path: Path, key: str) -> Stored:
        entry = headers[path][key]
        kind = BLOCK_TYPES.get(entry["dtype"])
        shape = tuple(entry["shape"]) if kind is None else packed_shape(entry["shape"], kind)
        dtype = DTYPES[entry["dtype"]] if kind is None else torch.uint8
        return Stored(key, path, entry["data_offsets"][0], shape, dtype)

    found, scales = {}, {}
    for name, (path, key) in source.tensors.items():
        found[name] = place(path, key)
        if name in source.stored:
            weight = source.stored[name]
            beside = dict(weight.scales) | ({SMOOTHING: weight.smoothing} if weight.smoothing is not None else {})
            scales[name] = {what: place(path, key) for what, key in beside.items()}
    return dict(sorted(found.items(), key=lambda item: (item[1].path, item[1].offset))), scales


def _with_scales(
    wanted: Mapping[str, Stored], scales: Mapping[str, Mapping[str, Stored]]
) -> dict[tuple[str, str], Stored]:
    """The tensors in their order, each together with its scales, these by their parameter and it as ``WEIGHT``."""
    return {
        (name, what): part
        for name, stored in wanted.items()
        for what, part in sorted(({WEIGHT: stored} | dict(scales.get(name, {}))).items(), key=lambda p: p[1].offset)
    }


def _tensors(
    modules: Mapping[str, Any], wanted: Mapping[tuple[str, str], Stored], device: torch.device, lock: Lock
) -> Generator[tuple[tuple[str, str], torch.Tensor], None, None]:
    """Those that stay in RAM first, as the files' pages, while the others are being read; on the CPU all are pages."""
    stays = {
        key: stored for key, stored in wanted.items() if isinstance(modules[key[0].rpartition(".")[0]], StaysInRam)
    }
    if device.type == "cpu":
        yield from mapped(wanted)
        return
    rest = {key: stored for key, stored in wanted.items() if key not in stays}
    with closing(read_ahead(rest, device, lock)) as tensors:
        first = list(islice(tensors, 1))  # from here on its threads read
        yield from mapped(stays)
        yield from first
        yield from tensors


def _put(tensors: Iterable[tuple[Any, str, torch.Tensor]]) -> None:
    """Make tensors the parameters of their modules. ``check_tensors`` has compared names and shapes."""
    for module, parameter, tensor in tensors:
        setattr(module, parameter, torch.nn.Parameter(tensor, requires_grad=False))


def _block_of(name: str) -> int | None:
    """The index of the block that a tensor belongs to; None: to none."""
    return int(name.split(".", 2)[1]) if name.startswith(f"{BLOCKS}.") else None
