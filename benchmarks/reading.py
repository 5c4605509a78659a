"""How fast weights files become a transformer, against reading the same bytes raw, and what memory that takes.

    python benchmarks/reading.py [--gib 20] [--folder /dev/shm] [--formats bf16 fp8 int8 Q8_0 Q4_K] [--cold]

For each format a synthetic file of the released width (random bytes, as many blocks as fit into --gib) is written to
--folder and read: raw, in large sequential calls by one thread and by several (the faster counts), into buffers that are
pinned if there is a card; then by the pack. On a card that is `fill`, to the end of the last copy and quantization. It does
not read the weights of the modulation, which are read for each schedule; that is measured by itself. Without a card `fill`
maps the file and reads nothing, so there the reading ahead is measured that a card's `fill` is fed by. A file of bf16 is
also quantized while it is read.

Memory: the most anonymous memory (RssAnon) during both, less that before. The page cache is warm (each file was just read
once), or with --cold dropped before each measurement (posix_fadvise; on tmpfs nothing can be dropped). GB are 10^9 bytes.
"""

import argparse
import json
import math
import os
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import environment, keep

from qwen_edit.blocks import BLOCK_TYPES
from qwen_edit.checkpoints import check_tensors, read_headers, transformer_from_file
from qwen_edit.filling import fill, places
from qwen_edit.modulation import modulation_linears
from qwen_edit.packed import PACKED, keep_packed
from qwen_edit.quantize import is_modulation, prepare
from qwen_edit.reading import read_ahead
from qwen_edit.stored_weights import keep_stored
from qwen_edit.transformer import QwenEditTransformer

FORMATS = ("bf16", "fp8", "int8", "Q8_0", "Q4_K")
FORMS = {"bf16": (None, "fp8", "int8"), "fp8": ("fp8",), "int8": ("int8",)}  # how a file is run; GGUF: packed
CHUNK = 64 * 2**20
THREADS = (1, 4, 8)
RANDOM = np.random.default_rng(0).integers(0, 256, CHUNK + 4096, dtype=np.uint8)
RANDOM[1::2] &= 0x3F  # as the upper byte of a bf16: no NaN, no infinity


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = QwenEditTransformer(num_layers=layers, zero_cond_t=True)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def layers_for(gib: float, file_format: str) -> int:
    one, two = (total_bytes(shapes(n), file_format) for n in (1, 2))
    return max(1, min(60, round((gib * 2**30 - one) / (two - one)) + 1))


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("transformer_blocks.") and len(shape) == 2


def total_bytes(state: dict[str, tuple[int, ...]], file_format: str) -> int:
    return sum(nbytes(name, shape, file_format) for name, shape in state.items())


def nbytes(name: str, shape: tuple[int, ...], file_format: str) -> int:
    count = math.prod(shape)
    if file_format == "bf16" or not is_quantized(name, shape):
        return count * 2
    kind = BLOCK_TYPES.get(file_format)
    return count if kind is None else count // kind.values * kind.nbytes


def write_random(file, size: int) -> None:
    while size > 0:
        part = RANDOM[: min(size, CHUNK)]
        file.write(part)
        size -= len(part)


def write_safetensors(path: Path, layers: int, file_format: str) -> None:
    entries: list[tuple[str, str, list[int], bytes | int]] = []
    described = {"fp8": ("F8_E4M3", b'{"format": "float8_e4m3fn"}'), "int8": ("I8", b'{"format": "int8_tensorwise"}')}
    for name, shape in shapes(layers).items():
        if file_format == "bf16" or not is_quantized(name, shape):
            entries.append((name, "BF16", list(shape), nbytes(name, shape, file_format)))
            continue
        dtype, text = described[file_format]
        layer = name.removesuffix("weight")
        scale = struct.pack("<f", 1e-4)
        entries.append((name, dtype, list(shape), math.prod(shape)))
        entries.append((layer + "weight_scale", "F32", [1], scale))
        entries.append((layer + "comfy_quant", "U8", [len(text)], text))
    header, offset = {}, 0
    for name, dtype, shape, data in entries:
        size = data if isinstance(data, int) else len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for *_, data in entries:
            write_random(file, data) if isinstance(data, int) else file.write(data)


def write_gguf(path: Path, layers: int, file_format: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "qwen_image")
    state = shapes(layers)
    for name, shape in state.items():
        kind = gguf.GGMLQuantizationType[file_format if is_quantized(name, shape) else "BF16"]
        size = nbytes(name, shape, file_format)
        writer.add_tensor_info(name, shape, np.dtype(np.float16), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        for name, shape in state.items():
            file.write(bytes(-file.tell() % 32))
            write_random(file, nbytes(name, shape, file_format))


def drop_pages(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def read_raw(path: Path, threads: int, pinned: bool) -> float:
    """GB/s of reading the file's bytes in order into one reused buffer for each thread."""
    size = path.stat().st_size
    buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=pinned).zero_() for _ in range(threads)]

    def part(index: int) -> None:
        view: Any = memoryview(buffers[index].numpy().data)
        with path.open("rb", buffering=0) as file:
            for start in range(index * CHUNK, size, threads * CHUNK):
                file.seek(start)
                wanted = min(CHUNK, size - start)
                done = 0
                while done < wanted:
                    done += file.readinto(view[done:wanted])

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(threads)))
    return size / (time.perf_counter() - begin) / 1e9


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("This system does not tell RssAnon.")


@contextmanager
def peak_anonymous() -> Iterator[Callable[[], int]]:
    """The most anonymous memory since the block began, less that at its beginning, in bytes."""
    before = most = anonymous()
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: most - before
    finally:
        over.set()
        thread.join()


def model_for(source, form: str | None, device: torch.device):
    """As `nodes/host/model.py` makes it: without weights, in the form that it will run in."""
    with torch.device("meta"):
        model = QwenEditTransformer.from_config(dict(source.config)).eval()
    check_tensors(model, source)
    model = torch.nn.Module.to(model, torch.bfloat16)
    prepare(model, None if source.stored else form)
    keep_packed(model, source.blocks, form)
    if source.stored:
        keep_stored(model, source.stored, device, form)
    return model.requires_grad_(False)


def read_by_the_pack(path: Path, form: str | None, device: torch.device) -> dict[str, float]:
    source = transformer_from_file(path, True)
    model = model_for(source, form, device)
    wanted, _ = places(source, read_headers(source))
    later = {name: stored for name, stored in wanted.items() if is_modulation(name)}
    size, size_later = (sum(stored.nbytes for stored in part.values()) for part in (wanted, later))
    reports = 0

    def progress(done: int, total: int) -> None:
        nonlocal reports
        reports += 1

    with peak_anonymous() as most:
        begin = time.perf_counter()
        if device.type == "cuda":
            weights = fill(model, source, torch.bfloat16, device, progress)
            torch.cuda.synchronize()
        else:
            for _ in read_ahead({name: stored for name, stored in wanted.items() if name not in later}, device):
                pass
        loaded = time.perf_counter() - begin
        begin = time.perf_counter()
        if device.type == "cuda":
            read_modulation(model, weights, torch.empty(0, dtype=torch.bfloat16, device=device))
            torch.cuda.synchronize()
        else:
            for _ in read_ahead(later, device):
                pass
        scheduled = time.perf_counter() - begin
        memory = most()
    return {
        "gb_per_s": round((size - size_later) / loaded / 1e9, 2),
        "seconds": round(loaded, 2),
        "modulation_gb_per_s": round(size_later / scheduled / 1e9, 2),
        "modulation_seconds": round(scheduled, 2),
        "anonymous_gib": round(max(0, memory) / 2**30, 2),
        "progress_reports": reports,
    }


def read_modulation(model, weights, like: torch.Tensor) -> None:
    linears = list(chain.from_iterable(modulation_linears(model)))
    with weights.ahead(linears, like):
        for linear in linears:
            assert weights.read(linear) is not None


def measure(path: Path, file_format: str, device: torch.device, cold: bool, repeats: int) -> Iterator[dict[str, Any]]:
    def fresh() -> None:
        if cold:
            drop_pages(path)

    pinned = device.type == "cuda"
    read_raw(path, 1, pinned)
    raw = {}
    for threads in THREADS:
        speeds = []
        for _ in range(repeats):
            fresh()
            speeds.append(read_raw(path, threads, pinned))
        raw[threads] = round(max(speeds), 2)
    for form in FORMS.get(file_format, (PACKED,)):
        runs = []
        for _ in range(repeats):
            fresh()
            runs.append(read_by_the_pack(path, form, device))
        best = max(runs, key=lambda run: run["gb_per_s"])
        best["anonymous_gib"] = max(run["anonymous_gib"] for run in runs)
        best["modulation_gb_per_s"] = max(run["modulation_gb_per_s"] for run in runs)
        best["modulation_seconds"] = min(run["modulation_seconds"] for run in runs)
        share, modulation = (round(best[f"{of}gb_per_s"] / max(raw.values()), 3) for of in ("", "modulation_"))
        gb = round(path.stat().st_size / 1e9, 2)
        yield {
            "format": file_format,
            "form": form or "as it is",
            "gb": gb,
            "raw_gb_per_s": raw,
            **best,
            "share_of_raw": share,
            "modulation_share_of_raw": modulation,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of each file, at most 60 blocks")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files are written")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--cold", action="store_true", help="drop the file's pages before each measurement")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement; the fastest counts")
    parser.add_argument("--name", help="keep the result as benchmarks/results/NAME.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for file_format in options.formats:
        write = write_gguf if file_format in BLOCK_TYPES else write_safetensors
        path = options.folder / f"reading 2511{'.gguf' if write is write_gguf else '.safetensors'}"
        try:
            write(path, layers_for(options.gib, file_format), file_format)
            for row in measure(path, file_format, device, options.cold, options.repeats):
                print(json.dumps(row), flush=True)
                rows.append(row)
        finally:
            path.unlink(missing_ok=True)
    result = {
        "pages": "cold" if options.cold else "warm",
        "device": device.type,
        "rows": rows,
        "environment": environment(),
    }
    if options.name:
        keep(options.name, result)
    print(json.dumps(result["environment"]))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
