"""What saved workflows rely on: ids, inputs in order, combo values; a light import; single files.

After a change of the nodes: QWEN_EDIT_WRITE_SNAPSHOT=1 pytest tests/comfyui/test_nodes.py -k snapshot
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_process import save_comfyui_vae
from edits import changed, failure, picture, small_edit
from graphs import loader, node
from safetensors.torch import save_file
from test_faults import transformer_state
from test_sameness import DEMO

pytestmark = pytest.mark.server
SNAPSHOT = Path(__file__).with_name("object_info.json")
FILE_COMBOS = {"model", "text_encoder", "vae", "lora_1", "lora_2", "lora_3", "lora_4"}
NODES = {
    "QwenEditAccelerate",
    "QwenEditLoader",
    "QwenEditSmartResize",
    "QwenEditEncode",
    "QwenEditLoraSwitch",
    "QwenEditSampler",
    "QwenEditStepPreset",
    "QwenEditRestoreSize",
    "QwenEditPerfLogger",
    "QwenEditBatch",
    "QwenEditPerfReport",
    "QwenEditStepSweep",
    "QwenEditReferenceCache",
    "QwenEditSave",
}


def interface(client) -> dict:
    """Of each node: its inputs in order with type, default, limits and combo values, and its outputs."""
    found = {}
    for name, info in sorted(client.get("/object_info").items()):
        if not name.startswith("QwenEdit"):
            continue
        inputs = []
        for kind in ("required", "optional"):
            for input_name in info["input_order"].get(kind, []):
                type_, *options = info["input"][kind][input_name]
                kept = {
                    k: v for k, v in (options[0] if options else {}).items() if k not in ("tooltip", "display_name")
                }
                if input_name in FILE_COMBOS:
                    kept.pop("options", None)
                    kept.pop("default", None)
                    type_ = "COMBO" if isinstance(type_, list) else type_
                inputs.append([input_name, kind, type_, kept])
        outputs = [list(o) for o in zip(info["output"], info["output_name"], info["output_is_list"], strict=True)]
        found[name] = {"inputs": inputs, "outputs": outputs, "output_node": info["output_node"]}
    return found


def without_tooltips(value):
    if isinstance(value, dict):
        return {k: without_tooltips(v) for k, v in value.items() if k != "tooltip"}
    return [without_tooltips(v) for v in value] if isinstance(value, list) else value


def breaks(old: dict, new: dict) -> list[str]:
    """What a workflow saved with `old` would trip over: inputs, combo values and outputs may only be appended."""
    problems = []
    for name, was in old.items():
        if name not in new:
            problems.append(f"{name} is gone")
            continue
        now = new[name]
        for index, (input_name, _, type_, options) in enumerate(was["inputs"]):
            if index >= len(now["inputs"]) or now["inputs"][index][0] != input_name:
                problems.append(f"{name}.{input_name} is no longer input {index}")
                continue
            _, _, new_type, new_options = now["inputs"][index]
            if new_type != type_ and not isinstance(type_, list):
                problems.append(f"{name}.{input_name} was {type_} and is {new_type}")
            values, new_values = (o.get("options", []) for o in (options, new_options))
            if new_values[: len(values)] != values:
                problems.append(f"{name}.{input_name} offered {values} and offers {new_values}")
            for limit, sign in (("min", 1), ("max", -1)):
                if limit in options and sign * new_options[limit] > sign * options[limit]:
                    problems.append(f"{name}.{input_name}: {limit} was {options[limit]} and is {new_options[limit]}")
        if now["outputs"][: len(was["outputs"])] != was["outputs"]:
            problems.append(f"{name}: outputs were {was['outputs']} and are {now['outputs']}")
    return problems


def test_the_nodes_are_those_of_the_snapshot(client):
    now = without_tooltips(interface(client))
    if os.environ.get("QWEN_EDIT_WRITE_SNAPSHOT"):
        SNAPSHOT.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    old = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    assert set(now) >= NODES
    assert breaks(old, now) == []
    assert now == old, "The nodes have grown. Write the snapshot anew (see the top of this file)."


@pytest.mark.parametrize(
    ("node_id", "change", "said"),
    [
        ("QwenEditSampler", lambda inputs: inputs.reverse(), "is no longer input 0"),
        ("QwenEditSampler", lambda inputs: inputs.pop(), "is no longer input 8"),
        ("QwenEditSampler", lambda inputs: inputs[4][3]["options"].remove("draft"), "offered"),
        ("QwenEditSampler", lambda inputs: inputs[6][3].update(max=10), "max was 1000"),
        ("QwenEditSampler", lambda inputs: inputs.append(["more", "optional", "INT", {}]), None),
        ("QwenEditSampler", lambda inputs: inputs[4][3]["options"].append("new"), None),
    ],
)
def test_the_rule_of_appending_catches_breaks(node_id, change, said):
    old, new = (json.loads(SNAPSHOT.read_text(encoding="utf-8")) for _ in range(2))
    change(new[node_id]["inputs"])
    problems = breaks(old, new)
    assert (problems == []) if said is None else any(said in p for p in problems)


@pytest.mark.parametrize(
    ("word", "node_id"),
    [
        ("fast", "QwenEditAccelerate"),
        ("folder", "QwenEditBatch"),
        ("gguf", "QwenEditLoader"),
        ("lightning", "QwenEditLoraSwitch"),
        ("提示词", "QwenEditEncode"),
        ("ksampler", "QwenEditSampler"),
        ("scheduler", "QwenEditStepPreset"),
    ],
)
def test_the_node_search_finds_a_node_by_what_it_is_for(client, word, node_id):
    assert word in client.get("/object_info")[node_id]["search_aliases"]


def test_every_input_has_a_tooltip_and_every_node_a_description(client):
    for name, info in client.get("/object_info").items():
        if name.startswith("QwenEdit"):
            assert info["description"], name
            for kind in ("required", "optional"):
                inputs = info["input"].get(kind, {})
                for input_name, (_, *options) in inputs.items():
                    assert "tooltip" in json.dumps(options), (name, input_name)


def test_the_pack_imports_neither_diffusers_nor_transformers_nor_cuda(host):
    """Nothing beyond what ComfyUI's own nodes import. Where there is no card as well: asking for a context ends the process."""
    from comfy_process import run_in_comfyui

    no_context = """
def refuse(*args):
    raise SystemExit("a CUDA context was asked for")  # which no `except Exception` takes
torch.cuda._lazy_init = torch._C._cuda_init = refuse
"""
    printed = run_in_comfyui(
        host,
        """
import asyncio
import nodes  # what ComfyUI itself brings, transformers among it
before = set(sys.modules)
extension = asyncio.run(pack.comfy_entrypoint())
nodes = asyncio.run(extension.get_node_list())
for node in nodes:
    node.GET_SCHEMA()
heavy = ["diffusers"] * ("diffusers" in sys.modules) + [n for n in ("diffusers", "transformers", "peft", "accelerate") if n in set(sys.modules) - before]
print("RESULT", len(nodes), heavy, torch.cuda.is_initialized())
""",
        before=no_context,
    )
    assert f"RESULT {len(NODES)} [] False" in printed


# Single files


def reconstruction(client, vae: dict) -> np.ndarray:
    graph = {
        "loader": loader(**vae),
        "picture": node("LoadImage", image=client.upload_array(picture(3))),
        "encode": node("VAEEncode", pixels=["picture", 0], vae=["loader", 2]),
        "decode": node("VAEDecode", samples=["encode", 0], vae=["loader", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="vae"),
    }
    (array,) = client.pictures(graph)
    return array


def test_a_single_vae_file_equals_the_folders(client, host, models):
    save_comfyui_vae(host, DEMO, models / "vae" / "demo vae.safetensors")
    assert np.array_equal(reconstruction(client, {"vae": "demo vae.safetensors"}), reconstruction(client, {}))


def test_a_single_transformer_needs_encoder_and_vae(client, models):
    save_file(transformer_state(), models / "diffusion_models" / "alone.safetensors")
    graph = small_edit(client)
    said = failure(client, changed(graph, "loader", model="alone.safetensors"))
    assert said.startswith("[QE_INPUT] alone.safetensors holds the transformer only")
    assert "text encoder and a VAE" in said
    save_file({"input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}, models / "diffusion_models" / "other.safetensors")
    said = failure(client, changed(graph, "loader", model="other.safetensors"))
    assert said.startswith("[QE_WEIGHTS] other.safetensors: found")  # and not what would go with it
    vae = models / "vae" / "any.safetensors"
    save_file({"x": transformer_state()["img_in.bias"]}, vae)
    said = failure(client, changed(graph, "loader", model="alone.safetensors", vae=vae.name))
    assert "Choose a text encoder too" in said
