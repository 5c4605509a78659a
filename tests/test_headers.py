"""Headers are parsed once, and never those of a file that has changed."""

import os
import time

import pytest
import torch
from safetensors.torch import save_file

from qwen_edit.checkpoints import read_header
from qwen_edit.headers import SETTLED_S, read_metadata


def write(path, value: float, names=("a",), age_s: float = 60.0, **metadata: str) -> None:
    save_file({name: torch.full((2, 3), value) for name in names}, path, metadata=metadata)
    then = time.time() - age_s
    os.utime(path, (then, then))


def test_a_header_is_parsed_once(tmp_path):
    path = tmp_path / "weights.safetensors"
    write(path, 1.0, about="me")
    assert read_header(path) is read_header(path)
    assert read_header(path)["a"]["shape"] == [2, 3]
    assert read_metadata(path) == {"about": "me"}


@pytest.mark.parametrize("age_s", [60.0, 0.0])
def test_a_file_written_again_is_read_again(tmp_path, age_s):
    path = tmp_path / "weights.safetensors"
    write(path, 1.0, ("a",), age_s)
    assert list(read_header(path)) == ["a"]
    write(path, 1.0, ("b",), age_s)  # of the same size
    assert list(read_header(path)) == ["b"]


def test_a_file_that_was_just_written_is_not_trusted_to_stay(tmp_path):
    path = tmp_path / "weights.safetensors"
    write(path, 1.0, ("a",), SETTLED_S / 2)
    state = path.stat()
    assert list(read_header(path)) == ["a"]
    save_file({"b": torch.zeros(2, 3)}, path, metadata={})
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # as within one tick of the clock
    assert path.stat().st_size == state.st_size
    assert list(read_header(path)) == ["b"]


def test_no_tensor_can_be_put_into_what_is_kept(tmp_path):
    path = tmp_path / "weights.safetensors"
    write(path, 1.0)
    with pytest.raises(TypeError):
        read_header(path)["a"] = {}  # pyright: ignore[reportIndexIssue]


def test_a_damaged_file_is_looked_at_anew(tmp_path):
    path = tmp_path / "weights.safetensors"
    write(path, 1.0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    then = time.time() - 60
    os.utime(path, (then, then))
    with pytest.raises(ValueError, match="QE_WEIGHTS"):
        read_header(path)
    path.write_bytes(whole)
    os.utime(path, (then, then))
    assert list(read_header(path)) == ["a"]


def test_another_file_of_the_same_size_and_time_is_read(tmp_path):
    path, other = tmp_path / "weights.safetensors", tmp_path / "other.safetensors"
    write(path, 1.0, ("a",))
    assert list(read_header(path)) == ["a"]
    state = path.stat()
    write(other, 1.0, ("b",))
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    assert list(read_header(path)) == ["b"]
