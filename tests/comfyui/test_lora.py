"""LoRAs on the real server: switched, stacked, in two branches, beside ComfyUI's own loader."""

import json

import numpy as np
import pytest
import torch
from comfy_process import run_in_comfyui
from edits import fresh
from graphs import edit_graph, node
from safetensors.torch import load_file, save_file
from test_sameness import DEMO

from qwen_edit.checkpoints import transformer_from_folder
from qwen_edit.lora import read_lora
from qwen_edit.transformer import QwenEditTransformer

TARGETS = ("attn.to_q", "attn.to_out.0", "img_mlp.net.2", "img_mod.1")
RANK = 4


def lora_state(seed: int, dotted: str = "transformer.{}.lora_{}.weight", strength: float = 4.0) -> dict:
    """A random LoRA of the demo model's shape; the key style is a parameter."""
    with torch.device("meta"):
        model = QwenEditTransformer.from_config(dict(transformer_from_folder(DEMO).config))
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for block in range(model.config.num_layers):
        for target in TARGETS:
            name = f"transformer_blocks.{block}.{target}"
            linear = model.get_submodule(name)
            for part, shape in (("A", (RANK, linear.in_features)), ("B", (linear.out_features, RANK))):
                scale = strength / shape[1] ** 0.5
                state[dotted.format(name, part)] = torch.randn(shape, generator=generator) * scale
    return state


def model_linears() -> dict[str, tuple[int, int]]:
    """The targets in the demo model and their shapes ``[out, in]``."""
    with torch.device("meta"):
        model = QwenEditTransformer.from_config(dict(transformer_from_folder(DEMO).config))
    names = [f"transformer_blocks.{block}.{target}" for block in range(model.config.num_layers) for target in TARGETS]
    return {name: tuple(model.get_submodule(name).weight.shape) for name in names}


def product_state(shapes, dotted: str, alpha: float | None) -> dict:
    """Random factors of the parts and shapes that ``shapes(out, in)`` names, for each target."""
    generator = torch.Generator().manual_seed(7)
    state = {}
    for name, (rows, columns) in model_linears().items():
        key = dotted.format(name, name.replace(".", "_"))
        for part, shape in shapes(rows, columns).items():
            state[f"{key}.{part}"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        if alpha is not None:
            state[f"{key}.alpha"] = torch.tensor(alpha)
    return state


def loha_state(rank: int = 3, dotted: str = "lora_unet_{1}", alpha: float | None = 9.0) -> dict:
    def shapes(rows, columns):
        return {f"hada_w{i}_{side}": (rows, rank) if side == "a" else (rank, columns) for i in (1, 2) for side in "ab"}

    return product_state(shapes, dotted, alpha)


def lokr_state(factored=(False, True), dotted: str = "diffusion_model.{0}", alpha: float | None = 4.0) -> dict:
    def shapes(rows, columns):
        result = {}
        for i, (m, n) in enumerate(((4, 4), (rows // 4, columns // 4)), start=1):
            if factored[i - 1]:
                result |= {f"lokr_w{i}_a": (m, 2), f"lokr_w{i}_b": (2, n)}
            else:
                result[f"lokr_w{i}"] = (m, n)
        return result

    return product_state(shapes, dotted, alpha)


PRODUCTS = {
    "loha": loha_state(),
    "loha bare without alpha": loha_state(2, "{0}", None),
    "loha diffusers": loha_state(4, "transformer.{0}"),
    "lokr": lokr_state(),
    "lokr kohya": lokr_state((False, True), "lora_unet_{1}", 1.0),
    "lokr diffusers, both": lokr_state((True, True), "transformer.{0}"),
    "lokr SimpleTuner": lokr_state((True, True), "lycoris_{1}", None),
    "lokr, left factored": lokr_state((True, False)),
    "lokr, none factored": lokr_state((False, False)),
}


@pytest.fixture(scope="module", autouse=True)
def lora_files(models):
    save_file(lora_state(1), models / "loras" / "first.safetensors")
    save_file(lora_state(2), models / "loras" / "second.safetensors")
    native = {}
    for key, value in lora_state(1).items():
        native[
            key.replace("transformer.", "diffusion_model.", 1)
            .replace("lora_A", "lora_down")
            .replace("lora_B", "lora_up")
        ] = value
    for key in [k for k in native if "lora_down" in k]:
        native[key.replace("lora_down.weight", "alpha")] = torch.tensor(float(RANK) / 2)
    save_file(native, models / "loras" / "first_half_alpha.safetensors")


@pytest.fixture
def graph(client):
    rows = np.linspace(0, 1, 64)[:, None, None]
    picture = np.broadcast_to(rows, (64, 64, 3)) * np.array([1.0, 0.6, 0.3])
    return edit_graph([client.upload_array(picture)], "make it black and white", preset="custom", steps=2, seed=3)


def with_switch(graph: dict, **slots) -> dict:
    inputs = {f"lora_{i}": "none" for i in range(1, 5)} | {f"strength_{i}": 1.0 for i in range(1, 5)}
    switched = {**graph, "switch": node("QwenEditLoraSwitch", model=["loader", 0], **inputs | slots)}
    switched["sampler"] = node("QwenEditSampler", **graph["sampler"]["inputs"] | {"model": ["switch", 0]})
    return switched


def picture_of(client, graph: dict) -> np.ndarray:
    (picture,) = client.pictures(graph)
    return picture


def test_switching_on_and_off_leaves_the_model_as_it_was(client, graph):
    without = picture_of(client, graph)
    first = picture_of(client, with_switch(graph, lora_1="first.safetensors"))
    second = picture_of(client, with_switch(graph, lora_1="second.safetensors"))
    both = picture_of(client, with_switch(graph, lora_1="first.safetensors", lora_2="second.safetensors"))
    seen = [without, first, second, both]
    for i, one in enumerate(seen):
        assert all(np.abs(one - other).max() > 5 / 255 for other in seen[i + 1 :])
    off = picture_of(client, with_switch(graph, lora_1="first.safetensors", strength_1=0.0))
    assert np.array_equal(off, without)
    assert np.array_equal(picture_of(client, fresh(graph)), without)


def test_two_branches_do_not_disturb_each_other(client, graph):
    alone = [picture_of(client, with_switch(graph, lora_1=f"{n}.safetensors")) for n in ("first", "second")]
    together = dict(with_switch(graph, lora_1="first.safetensors"))
    other = with_switch(graph, lora_1="second.safetensors")
    together["switch2"] = other["switch"]
    together["sampler2"] = node("QwenEditSampler", **graph["sampler"]["inputs"] | {"model": ["switch2", 0], "seed": 3})
    together["decode2"] = node("VAEDecode", samples=["sampler2", 0], vae=["loader", 2])
    together["save2"] = node("SaveImage", images=["decode2", 0], filename_prefix="second")
    result = client.run(together)
    pictures = {ref.node: array for ref, array in zip(result.images(), client.arrays(result), strict=True)}
    assert np.array_equal(pictures["save"], alone[0])
    assert np.array_equal(pictures["save2"], alone[1])


def test_alpha_scales_and_native_loader_agrees(client, graph):
    """lora_down/lora_up with alpha = rank / 2 is half of the same LoRA; ComfyUI's own loader gives the same."""
    half = picture_of(client, with_switch(graph, lora_1="first.safetensors", strength_1=0.5))
    alpha = picture_of(client, with_switch(graph, lora_1="first_half_alpha.safetensors"))
    assert np.abs(half - alpha).max() <= 1 / 255
    native = {
        **graph,
        "native": node(
            "LoraLoaderModelOnly", model=["loader", 0], lora_name="first_half_alpha.safetensors", strength_model=1.0
        ),
    }
    native["sampler"] = node("QwenEditSampler", **graph["sampler"]["inputs"] | {"model": ["native", 0]})
    assert np.abs(picture_of(client, native) - alpha).max() <= 2 / 255
    assert np.abs(alpha - picture_of(client, graph)).max() > 5 / 255
    # native patches on weights and the switch's addends on top of them
    stacked = with_switch(native, lora_1="first_half_alpha.safetensors")
    stacked["switch"]["inputs"]["model"] = ["native", 0]
    full = picture_of(client, with_switch(graph, lora_1="first.safetensors"))
    assert np.abs(picture_of(client, stacked) - full).max() <= 2 / 255


DELTAS = """
import json
import comfy.lora
import comfy.utils
from safetensors.torch import save_file

folder = Path(FOLDER)
linears = json.loads((folder / "linears.json").read_text())
names = {}
for name in linears:
    flat = name.replace(".", "_")
    for key in (name, f"transformer.{name}", f"diffusion_model.{name}", f"lora_unet_{flat}", f"lycoris_{flat}"):
        names[key] = name
for path in folder.glob("*.safetensors"):
    patches = comfy.lora.load_lora(comfy.utils.load_torch_file(str(path)), names)
    deltas = {
        name: adapter.calculate_weight(torch.zeros(linears[name]), name, 1.0, 1.0, None, lambda a: a)
        for name, adapter in patches.items()
    }
    save_file(deltas, path.with_suffix(".deltas"))
"""


def test_products_make_the_differences_of_comfyuis_adapters(host, tmp_path):
    linears = model_linears()
    (tmp_path / "linears.json").write_text(json.dumps(linears))
    for name, state in PRODUCTS.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    run_in_comfyui(host, f"FOLDER = {str(tmp_path)!r}\n" + DELTAS)
    config = dict(transformer_from_folder(DEMO).config)
    for name in PRODUCTS:
        expected = load_file(tmp_path / f"{name}.deltas")
        ours = read_lora(tmp_path / f"{name}.safetensors", config).layers
        assert ours.keys() == expected.keys() == linears.keys()
        for module, layer in ours.items():
            assert (layer.scale * layer.b @ layer.a - expected[module]).norm() <= 1e-5 * expected[module].norm()


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_the_picture_with_a_product_is_that_of_the_native_loader(client, graph, models, kind):
    save_file(PRODUCTS[kind], models / "loras" / f"{kind}.safetensors")
    native = dict(graph)
    native["native"] = node(
        "LoraLoaderModelOnly", model=["loader", 0], lora_name=f"{kind}.safetensors", strength_model=1.0
    )
    native["sampler"] = node("QwenEditSampler", **graph["sampler"]["inputs"] | {"model": ["native", 0]})
    ours = picture_of(client, with_switch(graph, lora_1=f"{kind}.safetensors"))
    assert np.abs(picture_of(client, native) - ours).max() <= 2 / 255
    assert np.abs(ours - picture_of(client, graph)).max() > 5 / 255


KEY = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
BAD = {
    "of another model": (lambda s: {"double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(4, 8)}, "another model"),
    "with NaN": (lambda s: s | {KEY: s[KEY] * float("nan")}, f"{KEY} holds NaN"),
    "with infinity": (lambda s: s | {KEY: s[KEY] * float("inf")}, f"{KEY} holds NaN or infinity"),
    "with a rank mismatch": (lambda s: s | {KEY: s[KEY][:2].clone()}, "rank 2"),
    "of rank zero": (lambda s: s | {KEY: s[KEY][:0].clone()}, "rank zero"),
    "of another width": (lambda s: s | {KEY: s[KEY][:, :8].clone()}, "needs"),
    "without counterpart": (lambda s: {k: v for k, v in s.items() if k != KEY}, "no counterpart"),
    "of kind DoRA": (lambda s: s | {KEY.replace("lora_A.weight", "dora_scale"): torch.zeros(4)}, "kind"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_loras_are_refused_by_name(client, graph, models, kind):
    from comfy_client import ExecutionFailed

    before = picture_of(client, graph)
    change, message = BAD[kind]
    name = f"bad {kind}.safetensors"
    save_file(change(lora_state(5)), models / "loras" / name)
    with pytest.raises(ExecutionFailed, match=r"\[QE_LORA\]") as failed:
        client.run(with_switch(graph, lora_1=name))
    assert name in str(failed.value)
    assert message in str(failed.value)
    assert np.array_equal(picture_of(client, fresh(graph)), before)


def test_a_partly_matching_lora_is_applied_with_a_counted_warning(client, graph, good, models):
    state = lora_state(1) | {
        "transformer.other_blocks.0.to_q.lora_A.weight": torch.zeros(4, 8),
        "transformer.other_blocks.0.to_q.lora_B.weight": torch.zeros(8, 4),
    }
    save_file(state, models / "loras" / "partly.safetensors")
    switched = with_switch(graph, lora_1="partly.safetensors")
    result = client.run(switched)
    assert "1 modules of the file are not applied" in result.outputs["switch"]["text"][0]
    whole = picture_of(client, with_switch(graph, lora_1="first.safetensors"))
    assert np.array_equal(client.arrays(result)[0], whole)
