"""Reading ahead: every tensor as safetensors itself reads it."""

import os
import threading
from contextlib import closing

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qwen_edit import reading
from qwen_edit.checkpoints import FLOAT_DTYPES, read_header
from qwen_edit.filling import _tensors
from qwen_edit.quantize import StaysInRam
from qwen_edit.reading import Stored, read_ahead

CPU = torch.device("cpu")


@pytest.fixture
def files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for number, dtype in enumerate((torch.bfloat16, torch.float32)):
        shapes = [(3, 5), (64, 7), (1,), (33,), (128, 128), (2, 2), (9, 1)]
        state = {f"t{number}.{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}
        save_file(state, tmp_path / f"{number}.safetensors")
    return sorted(tmp_path.glob("*.safetensors"))


def stored(files):
    found = {}
    for path in files:
        for key, entry in read_header(path).items():
            dtype = FLOAT_DTYPES[entry["dtype"]]
            found[f"model.{key}"] = Stored(key, path, entry["data_offsets"][0], tuple(entry["shape"]), dtype)
    return found


def in_file(place: Stored) -> torch.Tensor:
    with safe_open(place.path, framework="pt") as file:
        return file.get_tensor(place.name)


@pytest.mark.parametrize("part", [100, reading.PART], ids=["many parts", "one part"])
@pytest.mark.parametrize("order", ["as they lie", "backwards"])
def test_values_and_order(files, monkeypatch, part, order):
    monkeypatch.setattr(reading, "PART", part)
    monkeypatch.setattr(reading, "SLABS", 3)
    wanted = stored(files)
    if order == "backwards":
        wanted = dict(reversed(wanted.items()))
    got = list(read_ahead(wanted, CPU))  # nothing overwrites what was read before
    assert [name for name, _ in got] == list(wanted)
    for name, tensor in got:
        expected = in_file(wanted[name])
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


def test_tensors_side_by_side_are_read_at_once(files, monkeypatch):
    sizes = []
    read = reading._read

    def counted(part, slab, open_files):
        sizes.append(len(part.tensors))
        read(part, slab, open_files)

    monkeypatch.setattr(reading, "_read", counted)
    list(read_ahead(stored(files), CPU))
    assert sizes == [7, 7]  # all of a file


def test_a_file_cut_off_is_an_error(files):
    wanted = stored(files)
    with files[1].open("r+b") as file:
        file.truncate(files[1].stat().st_size - 8)
    with pytest.raises(OSError, match="ends inside"):
        list(read_ahead(wanted, CPU))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
def test_whoever_stops_early_leaves_no_thread_and_no_open_file(files):
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with closing(read_ahead(stored(files), CPU)) as tensors:
        next(tensors)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_reading_goes_on_while_pages_are_taken_that_stay_in_ram(files):
    """On a device that is no CPU; meta holds no values, but makes all the calls."""
    wanted = {(name, ""): place for name, place in stored(files).items()}
    modules = {"model.t0": torch.nn.Linear(1, 1), "model.t1": StaysInRam(1, 1)}
    with closing(_tensors(modules, wanted, torch.device("meta"), lambda *_: None)) as tensors:
        key, tensor = next(tensors)
        assert key[0].startswith("model.t1.")
        assert torch.equal(tensor, in_file(wanted[key]))
        assert any(t.name.startswith("qwen_edit_read") for t in threading.enumerate())
        assert {key, *(key for key, _ in tensors)} == wanted.keys()
