"""What a weights file is, from its header; damaged and foreign files are refused before weights are read."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from qwen_edit.checkpoints import (
    ZERO_COND_MARKER,
    is_edit_folder,
    read_header,
    transformer_from_file,
    transformer_from_folder,
    weight_files,
)
from qwen_edit.filling import fill
from qwen_edit.transformer import QwenEditTransformer

CONFIG = dict(num_layers=2, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=24)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return QwenEditTransformer(**CONFIG, zero_cond_t=True).state_dict()


def meta_model(source):
    with torch.device("meta"):
        return QwenEditTransformer.from_config(dict(source.config))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("marked", [True, False])
def test_a_single_file_tells_its_configuration(tmp_path, state, prefix, marked):
    stored = {prefix + k: v for k, v in state.items()}
    if marked:
        stored[prefix + ZERO_COND_MARKER] = torch.tensor([])
    save_file(stored, tmp_path / "model.safetensors")
    source = transformer_from_file(tmp_path / "model.safetensors")
    assert source.config["zero_cond_t"] is marked
    for name, value in CONFIG.items():
        assert source.config[name] == value
    model = meta_model(source)
    fill(model, source, torch.float32, torch.device("cpu"))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_the_user_can_override_the_version(tmp_path, state):
    save_file(dict(state), tmp_path / "model.safetensors")
    assert transformer_from_file(tmp_path / "model.safetensors", zero_cond_t=True).config["zero_cond_t"] is True


def test_fill_converts_and_reports_progress(tmp_path, state):
    save_file(dict(state), tmp_path / "model.safetensors")
    source = transformer_from_file(tmp_path / "model.safetensors")
    model, calls = meta_model(source), []
    fill(model, source, torch.bfloat16, torch.device("cpu"), lambda done, total: calls.append((done, total)))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    in_the_file = sum(p.numel() for p in model.parameters()) * 4
    assert calls[-1] == (in_the_file, in_the_file)


def test_missing_and_unexpected_tensors_are_counted(tmp_path, state):
    broken = dict(state)
    del broken["proj_out.bias"]
    broken["transformer_blocks.0.extra.weight"] = torch.zeros(1)
    save_file(broken, tmp_path / "model.safetensors")
    source = transformer_from_file(tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"\[QE_WEIGHTS\].*1 tensors are missing \(proj_out.bias\).*1 tensors are unexpected"
    ):
        fill(meta_model(source), source, torch.float32, torch.device("cpu"))


def test_a_wrong_shape_is_named(tmp_path, state):
    broken = dict(state) | {"transformer_blocks.1.attn.to_q.bias": torch.zeros(5)}
    save_file(broken, tmp_path / "model.safetensors")
    source = transformer_from_file(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"to_q.bias is \[5\], the model needs \[128\]"):
        fill(meta_model(source), source, torch.float32, torch.device("cpu"))


def _file(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


BAD_FILES = {
    "empty": (b"", "empty or cut off"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 40000000000\n", "Git LFS pointer"),
    "zip": (b"PK\x03\x04" + b"\0" * 100, "zip or pickle"),
    "pickle": (b"\x80\x02}q\x00." + b"\0" * 100, "zip or pickle"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 100, "GGUF"),
    "noise": (bytes(range(256)) * 4, "no safetensors header"),
    "huge header": (struct.pack("<Q", 1 << 40) + b"{" + b" " * 100, "no safetensors header"),
    "cut header": (struct.pack("<Q", 5000) + b"{" + b" " * 100, "ends inside its own header"),
    "truncated": (_file({"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}, b"\0" * 16), "damaged"),
    "trailing bytes": (_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 64), "damaged"),
    "overlap": (
        _file(
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            b"\0" * 12,
        ),
        "damaged",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_damaged_files_are_refused_with_the_likely_cause(tmp_path, kind):
    content, cause = BAD_FILES[kind]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"\[QE_WEIGHTS\] weights.safetensors \({len(content):,} bytes\).*{cause}"):
        read_header(path)


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "FLUX"),
        ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "LoRA"),
        ("decoder.middle.0.residual.0.gamma", "VAE"),
        ("visual.patch_embed.proj.weight", "text encoder"),
        ("something.else", "unknown architecture"),
    ],
)
def test_other_architectures_are_named(tmp_path, key, found):
    save_file({key: torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"found .*{found}.*needs the transformer of Qwen-Image-Edit"):
        transformer_from_file(tmp_path / "other.safetensors")


def test_folders(tmp_path, state):
    folder = tmp_path / "edit"
    (folder / "transformer").mkdir(parents=True)
    assert not is_edit_folder(folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "QwenImageEditPlusPipeline"}))
    assert is_edit_folder(folder)
    with pytest.raises(ValueError, match="lacks"):
        weight_files(folder / "transformer")
    names = list(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({k: state[k] for k in keys}, folder / "transformer" / shard)
    weight_map = {k: shard for shard, keys in shards.items() for k in keys}
    (folder / "transformer" / "w.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "x", **CONFIG, "zero_cond_t": True}))
    source = transformer_from_folder(folder)
    model = meta_model(source)
    fill(model, source, torch.float32, torch.device("cpu"))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    (folder / "transformer" / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks b.safetensors"):
        transformer_from_folder(folder)
