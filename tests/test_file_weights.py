"""The modulation read from its file for a schedule: the same table as from the weights in memory, whatever the file's form."""

import os
import shutil
from collections.abc import Iterator

import gguf_files
import pytest
import stored_files
import torch

from qwen_edit import file_weights
from qwen_edit.checkpoints import read_headers, transformer_from_file
from qwen_edit.file_weights import FileWeights
from qwen_edit.filling import fill, places
from qwen_edit.linear import NO_ADAPTERS, RESIDENT
from qwen_edit.modulation import compute_table
from qwen_edit.packed import PACKED, keep_packed
from qwen_edit.quantize import MISSING, StaysInRam, prepare
from qwen_edit.stored_weights import keep_stored
from qwen_edit.transformer import QwenEditTransformer

CPU = torch.device("cpu")
CARD = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"))
SCHEDULE = (1.0, 0.6, 0.2, 0.0)
FILES = ["bf16", "fp16", "fp8 scaled", "int8 rowwise", "Q4_K"]


@pytest.fixture(autouse=True)
def inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """How many weights each schedule has read from files."""
    counts: list[int] = []
    read_ahead = file_weights.read_ahead

    def counted(wanted, device, lock):
        counts.append(len(wanted))
        return read_ahead(wanted, device, lock)

    monkeypatch.setattr(file_weights, "read_ahead", counted)
    return counts


def loaded(tmp_path, kind: str, device: torch.device = CPU):
    if kind == "Q4_K":
        path = tmp_path / "qwen-2511.gguf"
        gguf_files.write(path, stored_files.float_state(), lambda name, tensor: kind if tensor.ndim == 2 else "F32")
    else:
        path = tmp_path / "qwen-2511.safetensors"
        if kind in ("bf16", "fp16"):
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
            stored_files.save_file({n: t.to(dtype) for n, t in stored_files.float_state().items()}, path)
        else:
            stored_files.write(path, kind)
    source = transformer_from_file(path)
    with torch.device("meta"):
        model = QwenEditTransformer.from_config(dict(source.config)).eval()
    model = torch.nn.Module.to(model, torch.bfloat16)
    form = PACKED if source.blocks else None
    prepare(model, form)
    keep_packed(model, source.blocks, form)
    keep_stored(model, source.stored, device, None, modulation_only=True)
    model.requires_grad_(False)
    weights = fill(model, source, torch.bfloat16, device)
    return path, model, weights if device.type != "cpu" else on_the_cpu(model, source)


def on_the_cpu(model, source) -> FileWeights:
    """Where there is no need for it, because the pages are there already."""
    weights, (wanted, _) = FileWeights(), places(source, read_headers(source))
    for name, module in model.named_modules():
        if isinstance(module, StaysInRam):
            weights.add(module, module.weight, file_weights.raw_data(module.weight), wanted[f"{name}.weight"])
    return weights


def table(model, weights, device: torch.device = CPU) -> torch.Tensor:
    return compute_table(
        model, SCHEDULE, torch.empty(0, dtype=torch.bfloat16, device=device), weights, NO_ADAPTERS
    ).blocks


@pytest.mark.parametrize("device", ["cpu", CARD])
@pytest.mark.parametrize("kind", FILES)
def test_the_same_table_whatever_the_form(tmp_path, reads, kind, device):
    if kind in stored_files.VARIANTS and MISSING is not None:
        pytest.skip(MISSING)
    _, model, weights = loaded(tmp_path, kind, torch.device(device))
    in_memory = table(model, RESIDENT, torch.device(device))
    assert torch.equal(table(model, weights, torch.device(device)), in_memory)
    assert reads == [4]


def test_a_weight_that_was_changed_is_not_read_from_the_file(tmp_path, reads):
    _, model, weights = loaded(tmp_path, "bf16")
    before = table(model, weights)
    linear = model.transformer_blocks[1].img_mod[1]
    original = linear.weight
    linear.weight = torch.nn.Parameter(original * 2, requires_grad=False)
    changed = table(model, weights)
    assert torch.equal(changed, table(model, RESIDENT))
    assert not torch.equal(changed, before)
    linear.weight = original  # as a patcher puts it back
    assert torch.equal(table(model, weights), before)
    assert reads == [4, 3, 4]


def test_a_replaced_forward_is_called_and_not_skipped(tmp_path, reads):
    """ComfyUI's bypass LoRAs replace it."""
    _, model, weights = loaded(tmp_path, "bf16")
    before = table(model, weights)
    linear = model.transformer_blocks[1].img_mod[1]
    own = linear.forward
    linear.forward = lambda x: 2 * own(x)
    changed = table(model, weights)
    assert torch.equal(changed, table(model, RESIDENT))
    assert not torch.equal(changed, before)
    del linear.forward
    assert torch.equal(table(model, weights), before)
    assert reads == [4, 3, 4]


@pytest.mark.parametrize("now", ["gone", "another"])
def test_a_file_that_is_no_longer_the_same_is_not_read(tmp_path, reads, now):
    path, model, weights = loaded(tmp_path, "bf16")
    before = table(model, weights)
    other = tmp_path / "other"
    shutil.copy(path, other)
    with other.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))
    if now == "gone":
        path.unlink()
    else:
        other.replace(path)
    assert torch.equal(table(model, weights), before)
    assert reads == [4, 0]


def test_an_error_while_reading_leaves_nothing_behind(tmp_path, reads, monkeypatch):
    path, model, weights = loaded(tmp_path, "bf16")
    before = table(model, weights)
    monkeypatch.setattr(file_weights, "_identity", lambda stored: weights._places[linear].file)
    linear, copy = model.transformer_blocks[0].img_mod[1], tmp_path / "copy"
    shutil.copy(path, copy)
    path.unlink()
    with path.open("wb") as file:
        file.write(bytes(100))
    with pytest.raises(OSError, match="ends inside"):
        table(model, weights)
    copy.replace(path)
    assert torch.equal(table(model, weights), before)
