"""Files that ComfyUI's save nodes write, and checkpoints that hold everything: the edit is that from the files they were
made of. Its text encoder is ComfyUI's own, small (see `probe_nodes`)."""

import numpy as np
import pytest
from comfy_process import run_in_comfyui, save_comfyui_vae
from edits import changed, edited, note, run_fresh
from graphs import Graph, node
from native_clip import SMALL_SIZES
from safetensors.torch import load_file, save_file
from stored_files import VARIANTS, random_state, write_state
from test_sameness import DEMO

pytestmark = [pytest.mark.server, pytest.mark.slow]

WIDTH = 128  # of text
TRANSFORMER = dict(num_layers=2, attention_head_dim=128, num_attention_heads=2, joint_attention_dim=WIDTH)
FILES = {
    "model": "kept qwen edit.safetensors",
    "text_encoder": "kept encoder.safetensors",
    "vae": "kept vae.safetensors",
}

ENCODER = """
from comfy.text_encoders import qwen_image
from safetensors.torch import save_file

with small_sizes(WIDTH, heads=4, kv_heads=4), torch.device("meta"):
    shapes = qwen_image.QwenImageTEModel(device="meta", dtype=torch.float32).qwen25_7b.transformer.state_dict()
torch.manual_seed(0)
state = {n: (torch.randn(t.shape) * 0.1 + ("norm" in n or "ln_q" in n)).bfloat16() for n, t in shapes.items()}
save_file(state, PATH)
"""


@pytest.fixture(scope="module", autouse=True)
def files(host, models) -> None:
    state = VARIANTS["fp8 scaled"](random_state(TRANSFORMER))
    write_state(models / "diffusion_models" / FILES["model"], "fp8 scaled", state)
    encoder, vae = models / "text_encoders" / FILES["text_encoder"], models / "vae" / FILES["vae"]
    run_in_comfyui(host, f"WIDTH, PATH = {WIDTH}, {str(encoder)!r}\n{SMALL_SIZES}{ENCODER}")
    save_comfyui_vae(host, DEMO, vae)
    parts = {"model.diffusion_model.": models / "diffusion_models" / FILES["model"], "vae.": vae}
    parts["text_encoders.qwen25_7b.transformer."] = encoder
    everything = {prefix + name: t for prefix, path in parts.items() for name, t in load_file(path).items()}
    save_file(everything, models / "checkpoints" / "kept everything.safetensors")


@pytest.fixture
def graph(graph: Graph) -> Graph:
    return changed(graph, "loader", precision="auto", **FILES)


@pytest.fixture(scope="module")
def _saved() -> list:
    return []


@pytest.fixture
def saved(client, _saved) -> None:
    """What ComfyUI's loaders read of the files, written by its save nodes, in folders that it offers models from."""
    if _saved:
        return
    made: Graph = {
        "model": node("UNETLoader", unet_name=FILES["model"], weight_dtype="default"),
        "clip": node("CLIPLoader", clip_name=FILES["text_encoder"], type="qwen_image", device="default"),
        "vae": node("VAELoader", vae_name=FILES["vae"]),
    }
    links = {name: [name, 0] for name in made}
    for class_type, folder, inputs in (
        ("ModelSave", "diffusion_models", ("model",)),
        ("CLIPSave", "clip", ("clip",)),
        ("VAESave", "vae", ("vae",)),
        ("CheckpointSave", "checkpoints", ("model", "clip", "vae")),
    ):
        made[class_type] = node(class_type, filename_prefix=f"{folder}/kept", **{i: links[i] for i in inputs})
    client.run(made, timeout_s=120)
    _saved.append(made)


SAVED = "kept_00001_.safetensors"
FROM_MODEL = dict(text_encoder="from the model folder", vae="from the model folder")
INSTEAD = {
    "ModelSave": dict(model=SAVED),
    "CLIPSave": dict(text_encoder=SAVED),
    "VAESave": dict(vae=SAVED),
    "all three": dict(model=SAVED, text_encoder=SAVED, vae=SAVED),
    "CheckpointSave": dict(model=f"checkpoint: {SAVED}", **FROM_MODEL),
}


@pytest.mark.parametrize("which", INSTEAD)
def test_the_edit_from_what_a_save_node_wrote_is_the_same(client, graph, good, saved, which):
    result = run_fresh(client, changed(graph, "loader", **INSTEAD[which]))
    assert np.array_equal(client.arrays(result)[0], good)
    assert "(2511, by the file's mark), fp8" in note(result, "loader")


def test_the_edit_from_a_checkpoint_that_holds_everything(client, graph, good):
    ours = changed(graph, "loader", model="checkpoint: kept everything.safetensors", **FROM_MODEL)
    assert np.array_equal(edited(client, ours), good)


def test_each_of_the_files_counts(client, graph, good):
    """Else equal pictures would say nothing."""
    assert not np.array_equal(edited(client, changed(graph, "encode", prompt="mirror it")), good)
    assert good.std() > 0.01
