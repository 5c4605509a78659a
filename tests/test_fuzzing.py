"""Random damage and random values (hypothesis): read properly or refused by name, within a bound of memory.

The ordinary run takes some hundred examples of each kind. A longer one: QWEN_EDIT_FUZZ=20000 pytest tests/test_fuzzing.py.
What was found is kept as `@example`s.
"""

import json
import math
import os
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from qwen_edit import geometry as geo
from qwen_edit.checkpoints import check_tensors, read_header, transformer_from_file
from qwen_edit.filling import fill
from qwen_edit.lora import read_lora
from qwen_edit.packed import keep_packed
from qwen_edit.quantize import prepare
from qwen_edit.recipes import PRESETS, recipe_for
from qwen_edit.text_encoder import MAX_PROMPT_CHARACTERS, as_plain_text
from qwen_edit.transformer import QwenEditTransformer

EXAMPLES = int(os.environ.get("QWEN_EDIT_FUZZ", "0"))
CONFIG = dict(num_layers=1, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=32)
# Of Python's own memory while a file of about 1 MB is looked at; tensors on meta take none.
MEMORY = 64 * 2**20


def fuzz(ordinary: int):
    """Bounded by the number of examples, without a database, so that every run is a new search."""
    return settings(
        max_examples=EXAMPLES or ordinary,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def filled(shape: list[int], value: float, dtype: torch.dtype) -> torch.Tensor:
    """Every element is ``value``, or what ``dtype`` makes of it."""
    return torch.full(shape, value, dtype=torch.float64).to(dtype)


@cache
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: tensor.bfloat16() for name, tensor in QwenEditTransformer(**CONFIG).state_dict().items()}


def checked(path: Path):
    source = transformer_from_file(path)
    with torch.device("meta"):
        model = QwenEditTransformer.from_config(dict(source.config)).eval()
    check_tensors(model, source)
    return source, model


def outcome(call: Callable[[], Any], *words: str) -> tuple[Any, str | None]:
    """What ``call`` returns, or the message of its ValueError, which starts with one of ``words``. Anything else is a bug."""
    try:
        return call(), None
    except ValueError as e:
        said = str(e)
    assert said.startswith(words), said
    return None, said


def look(path: Path) -> str | None:
    """The message with which a transformer's file is refused, None if it can be used. Anything else is a bug."""
    tracemalloc.start()
    try:
        found, said = outcome(lambda: checked(path), "[QE_WEIGHTS]")
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    if found is None:
        assert path.stem in said
        return said
    source, model = found
    if not source.stored:
        form = "gguf" if source.blocks else None
        prepare(model, form)
        keep_packed(model, source.blocks, form)
        fill(model, source, torch.float32, torch.device("cpu"))
    return None


# Safetensors


@cache
def header() -> dict:
    data = save(state())
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def write_sparse(path: Path, head: dict, size: int, padding: int = 0) -> None:
    """A file of this header whose weights take no disk."""
    text = json.dumps(head).encode() + b" " * padding
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)


dtypes = st.sampled_from(
    ["F32", "F16", "BF16", "F64", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "X", ""]
)
shapes = st.lists(st.integers(0, 2**40) | st.integers(0, 300), max_size=4)
names = (
    st.sampled_from(sorted(state()))
    | st.sampled_from(
        ["transformer_blocks.0.attn.to_q.comfy_quant", "transformer_blocks.0.attn.to_q.weight_scale", "scaled_fp8"]
    )
    | st.text(max_size=12)
    | st.from_regex(r"transformer_blocks\.(\d{1,12}|x)\.attn\.to_q\.weight", fullmatch=True)
)
metadata = (
    st.none()
    | st.dictionaries(
        st.sampled_from(["_quantization_metadata", "format", "x"]), st.text(max_size=20) | st.just('{"layers": []}')
    )
    | st.just(
        {"_quantization_metadata": '{"layers": {"transformer_blocks.0.attn.to_q": {"format": "int8_tensorwise"}}}'}
    )
)
changes = st.one_of(
    st.tuples(st.just("dtype"), names, dtypes),
    st.tuples(st.just("shape"), names, shapes),
    st.tuples(st.just("reshape"), names, st.integers(0, 3)),
    st.tuples(st.just("offset"), names, st.integers(-5, 5)),
    st.tuples(st.just("drop"), names, st.none()),
    st.tuples(st.just("rename"), names, names),
    st.tuples(st.just("prefix"), st.just(""), st.sampled_from(["model.diffusion_model.", "x", "transformer_blocks."])),
    st.tuples(st.just("metadata"), st.just(""), metadata),
)


def mutated(head: dict, what: str, name: str, how) -> None:
    if what == "metadata":
        head["__metadata__"] = how
    elif what == "prefix":
        items = {how + k: v for k, v in head.items()}
        head.clear()
        head.update(items)
    elif name not in head:
        if what in ("dtype", "rename"):  # one more, which holds nothing
            head[name] = {"dtype": how if what == "dtype" else "F32", "shape": [0], "data_offsets": [0, 0]}
    elif what == "drop":
        del head[name]
    elif what == "rename":
        head[how] = head.pop(name)
    elif what == "reshape":
        count = math.prod(head[name]["shape"])
        head[name]["shape"] = [[count], [1, count], [count, 1], [1, 1, count]][how]
    elif what == "offset":
        head[name]["data_offsets"] = [n + how for n in head[name]["data_offsets"]]
    else:
        head[name][what] = how


@fuzz(150)
@given(st.lists(changes, max_size=4), st.integers(-64, 64) | st.just(0), st.integers(0, 9))
@example([("metadata", "", None)], 0, 0)
@example([("rename", "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.999999999.attn.to_q.weight")], 0, 0)
@example([("rename", "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.x.attn.to_q.weight")], 0, 0)
@example([("drop", "transformer_blocks.0.attn.norm_q.weight", None)], 0, 0)
@example([("reshape", "img_in.weight", 0)], 0, 0)
@example([("reshape", "img_in.weight", 2)], 0, 0)
@example([("reshape", "proj_out.weight", 0)], 0, 0)
@example([("prefix", "", "transformer_blocks.")], 0, 0)
def test_safetensors_headers(tmp_path, changed, longer, padding):
    head = json.loads(json.dumps(header()))
    for change in changed:
        mutated(head, *change)
    size = max((v["data_offsets"][1] for k, v in header().items() if k != "__metadata__"), default=0)
    path = tmp_path / "fuzzed.safetensors"
    write_sparse(path, head, max(0, size + longer), padding)
    said = look(path)
    if not changed and not longer:
        assert said is None


@fuzz(60)
@given(st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), max_size=8), st.integers(0, 2**21))
@example([(0, 255), (7, 255)], 2**21)
def test_safetensors_bytes(tmp_path, changed, kept):
    data = bytearray(save(state())[:kept])
    for at, value in changed:
        if at < len(data):
            data[at] = value
    path = tmp_path / "fuzzed.safetensors"
    path.write_bytes(data)
    look(path)


# GGUF


@cache
def gguf_bytes(folder: Path) -> bytes:
    gguf_files = pytest.importorskip("gguf_files")
    path = folder / "good.gguf"
    gguf_files.write(path, state(), lambda name, tensor: "Q8_0" if tensor.ndim == 2 else "F32")
    return path.read_bytes()


@fuzz(60)
@given(
    st.lists(st.tuples(st.integers(0, 6000), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1)), max_size=4),
    st.just(0) | st.integers(0, 5000),
)
@example([(4, 4, 2)], 0)
@example([(8, 8, 2**64 - 1)], 0)
@example([(16, 8, 2**40)], 0)
def test_gguf_headers(tmp_path_factory, changed, cut):
    """Numbers of 1 to 8 bytes written anywhere into the header, and the file cut off."""
    good = gguf_bytes(tmp_path_factory.getbasetemp())
    data = bytearray(good[: len(good) - cut])
    for at, size, value in changed:
        data[at : at + size] = (value % 256**size).to_bytes(size, "little")
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(data)
    said = look(path)
    if not changed and not cut:
        assert said is None


def test_a_gguf_files_first_numbers_one_by_one(tmp_path_factory):
    """Every byte of the part before the tensors' names, to its extremes."""
    good = gguf_bytes(tmp_path_factory.getbasetemp())
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    for at in range(0, 120, 2):
        for value in (0, 127, 255):
            path.write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
            outcome(lambda: read_header(path), "[QE_WEIGHTS]")


# LoRA files

TARGET = "transformer_blocks.0.attn.to_q"
parts = st.sampled_from(
    ["lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha", "lora_A.default.weight", "lora_mid.weight",
     "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a",
     "lokr_w2_b", "lokr_t2", "dora_scale", "diff", "lora_magnitude_vector", "", "weight"]
)  # fmt: skip
modules = st.sampled_from(
    [TARGET, TARGET.replace(".", "_"), "img_in", "proj_out", "time_text_embed.timestep_embedder.linear_1", "x.y", ""]
)
prefixes = st.sampled_from(
    ["", "transformer.", "diffusion_model.", "lora_unet_", "lycoris_", "lora_te_", "base_model.model."]
)
tensors = st.tuples(
    st.lists(st.sampled_from([0, 1, 2, 4, 16, 32, 128]), max_size=3),
    st.sampled_from([0.5, -1.0, 1e38, float("nan"), float("inf")]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool]),
)
PAIR = [("transformer.", TARGET, "lora_A.weight", ([4, 128], 0.5, torch.float32)),
        ("transformer.", TARGET, "lora_B.weight", ([128, 4], 0.5, torch.float32))]  # fmt: skip
adapters = st.dictionaries(st.sampled_from(["r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_dora", "use_rslora", "x"]),
                           st.none() | st.integers(-2, 9) | st.text(max_size=5) | st.dictionaries(st.text(max_size=4), st.integers(-1, 8), max_size=2))  # fmt: skip


@fuzz(200)
@given(
    st.lists(st.tuples(prefixes, modules, parts, tensors), max_size=5), st.booleans(),
    st.none() | adapters.map(json.dumps) | st.text(max_size=10),
)  # fmt: skip
@example([], True, None)
@example([("", "", "", ([], 0.5, torch.float32))], False, None)
@example([("transformer.", TARGET, "alpha", ([1], 0.5, torch.float32))], True, None)
@example([], True, '{"transformer.r": "4"}')
@example([], True, "[]")
def test_lora_files(tmp_path, entries, with_pair, adapter):
    made = {}
    for prefix, module, part, (shape, value, dtype) in (PAIR if with_pair else []) + entries:
        made[".".join(p for p in (prefix + module, part) if p)] = filled(shape, value, dtype)
    path = tmp_path / "fuzzed.safetensors"
    save_file(made, path, None if adapter is None else {"lora_adapter_metadata": adapter})
    file, said = outcome(lambda: read_lora(path, dict(CONFIG)), "[QE_LORA]", "[QE_WEIGHTS]")
    if file is None:
        assert path.name in said
    else:
        assert file.layers
        for layer in file.layers.values():
            assert math.isfinite(layer.scale)
            assert layer.a.shape[0] == layer.b.shape[1]
    if with_pair and not entries and adapter is None:
        assert list(file.layers) == [TARGET]


# Geometry

sides = st.integers(1, 3000) | st.sampled_from([1, 31, 32, 33, 2048, 2049, 20000])


@fuzz(300)
@given(sides, sides, st.floats(0.001, 5), st.integers(0, 4000), st.sampled_from([*geo.FITS, "x"]), st.booleans())
@example(1, 20000, 1.0, 1024, "pad", True)
@example(20000, 1, 4.0, 1024, "crop", True)
def test_plans(width, height, megapixels, longest, fit, by_area):
    def planned():
        area, side = megapixels * 2**20, longest
        target = geo.target_by_area(width, height, area) if by_area else geo.target_by_longest_side(width, height, side)
        return target, geo.plan(width, height, target, fit)

    found, _ = outcome(planned, "[QE_INPUT]")
    if found is None:
        assert fit == "x" or not 32**2 <= megapixels * 2**20 <= 4 * 2**20 or not 32 <= longest <= geo.MAX_SIDE
        return
    target, plan = found
    assert all(side % 32 == 0 and 32 <= side <= geo.MAX_SIDE for side in target)
    for box, sizes in ((plan.source_box, (width, height)), (plan.content_box, target)):
        assert 0 <= box.x <= box.x + box.width <= sizes[0]
        assert 0 <= box.y <= box.y + box.height <= sizes[1]
        assert box.width >= 1
        assert box.height >= 1
    assert plan.describe()


@fuzz(80)
@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 7, 33, 40]), min_size=2, max_size=5),
    st.sampled_from([0.0, 0.5, 1.0, 3.0, -1.0, float("nan"), float("inf")]),
    st.sampled_from([torch.float32, torch.float16, torch.float64, torch.uint8, torch.bool]), st.sampled_from(geo.FITS),
)  # fmt: skip
def test_pictures_of_any_shape_go_there_and_back(shape, value, dtype, fit):
    image = filled(shape, value, dtype)
    before = image.clone()

    def there_and_back():
        rgb = geo.to_rgb(image)
        size = rgb.shape[2], rgb.shape[1]
        plan = geo.plan(*size, geo.target_by_longest_side(*size, 64), fit)
        return rgb, geo.restore(replace(plan, source=image), geo.apply(plan, image))

    found, _ = outcome(there_and_back, "[QE_INPUT]", "[QE_NAN]")
    assert torch.equal(image.double().nan_to_num(9), before.double().nan_to_num(9))
    if found is not None:
        rgb, back = found
        assert back.shape == rgb.shape


# What a workflow can say

anything = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers(), max_size=2)
)


@fuzz(300)
@given(st.sampled_from(list(PRESETS)) | anything, anything, anything, anything)
@example("draft", True, 0.0, 0.0)
@example("draft", 0, "4", 0.0)
@example("draft", 0, 0.0, [1])
@example(["draft"], 0, 0.0, 0.0)
def test_recipes(preset, steps, cfg, shift):
    recipe, _ = outcome(lambda: recipe_for(preset, steps, cfg, shift), "[QE_INPUT]")
    if recipe is not None:
        assert 1 <= recipe.steps <= 1000
        assert 1 <= recipe.true_cfg_scale <= 100


@fuzz(150)
@given(st.text() | st.text(alphabet="<|im_endvsopag>", max_size=60), st.integers(1, 900))
@example("\ud800<|im_end|>", 1)
def test_prompts(text, times):
    plain, _ = as_plain_text(text * times)
    plain.encode()
    assert len(plain) <= 2 * MAX_PROMPT_CHARACTERS
    assert "<|im_end|>" not in plain


# Manifests of batches are fuzzed in test_manifest.py.
