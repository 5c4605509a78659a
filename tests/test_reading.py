"""Reading ahead: every tensor as safetensors itself reads it."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qwen_edit import reading
from qwen_edit.checkpoints import FLOAT_DTYPES, read_header
from qwen_edit.reading import Stored, read_ahead


@pytest.fixture
def files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for number, dtype in enumerate((torch.bfloat16, torch.float32)):
        shapes = [(3, 5), (64, 7), (1,), (33,), (128, 128), (2, 2), (9, 1)]
        state = {f"t{number}.{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}
        save_file(state, tmp_path / f"{number}.safetensors")
    return sorted(tmp_path.glob("*.safetensors"))


def stored(files, keep=()):
    found = {}
    for path in files:
        for key, entry in read_header(path).items():
            dtype = FLOAT_DTYPES[entry["dtype"]]
            found[f"model.{key}"] = Stored(
                key, path, entry["data_offsets"][0], tuple(entry["shape"]), dtype, key in keep
            )
    return found


def test_values_and_order(files):
    wanted = stored(files)
    got = [(name, tensor.clone()) for name, tensor in read_ahead(wanted, pinned=False)]
    assert [name for name, _ in got] == list(wanted)
    for name, tensor in got:
        with safe_open(wanted[name].path, framework="pt") as file:
            expected = file.get_tensor(wanted[name].name)
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


def test_what_is_kept_is_not_overwritten(files):
    keep = {"t0.0", "t1.4"}
    wanted = stored(files, keep)
    kept = {name: tensor for name, tensor in read_ahead(wanted, pinned=False) if wanted[name].keep}
    assert len(kept) == 2
    for name, tensor in kept.items():
        with safe_open(wanted[name].path, framework="pt") as file:
            assert torch.equal(tensor, file.get_tensor(wanted[name].name))


def test_few_buffers_serve_many_tensors(files, monkeypatch):
    monkeypatch.setattr(reading, "AHEAD", 2)
    places = {tensor.data_ptr() for _, tensor in read_ahead(stored(files), pinned=False)}
    assert len(places) == 2


def test_a_file_cut_off_is_an_error(files):
    wanted = stored(files)
    with files[1].open("r+b") as file:
        file.truncate(files[1].stat().st_size - 8)
    with pytest.raises(OSError, match="ends inside"):
        list(read_ahead(wanted, pinned=False))
    # whoever stops early leaves no thread behind that still writes
    next(iter(read_ahead(wanted, pinned=False)))
