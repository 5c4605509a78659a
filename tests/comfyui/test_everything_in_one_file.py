"""Files of models/checkpoints that hold transformer, text encoder and VAE, and what the loader says of quantized files."""

import json

import pytest
import torch
from comfy_process import run_in_comfyui, save_comfyui_vae
from edits import changed, failure, small_edit
from safetensors.torch import load_file
from stored_files import write
from test_faults import DEMO

pytestmark = [pytest.mark.server, pytest.mark.slow]

# Enough of the encoder for ComfyUI to know it by; it leaves the rest of the 7 B as it is allocated, untouched.
ENCODER = "text_encoders.qwen25_7b.transformer."
BIAS, NORM = "model.layers.0.self_attn.k_proj.bias", "visual.merger.ln_q.weight"

CODE = """
import json
from types import SimpleNamespace
import comfy.sd
import comfy.utils
import folder_paths
folder_paths.add_model_folder_path("checkpoints", FOLDER)
from server import PromptServer
PromptServer.instance = SimpleNamespace(prompt_queue=SimpleNamespace(currently_running=True))
from pack.nodes.host import folders, loading
from pack.nodes.host.request import LoadRequest
from pack.qwen_edit.checkpoints import transformer_from_file

names = [name for name in folders.models() if name.startswith("checkpoint: ")]
with torch.inference_mode():
    loaded = loading.load(LoadRequest(names[0]))
    encoder = loaded.clip.cond_stage_model.state_dict()
    vae = loaded.vae.first_stage_model.state_dict()
    alone = comfy.sd.VAE(sd=comfy.utils.load_torch_file(VAE)).first_stage_model.state_dict()
    result = {
        "names": names,
        "bias": next(t for n, t in encoder.items() if n.endswith(BIAS)).float().tolist(),
        "vae": vae.keys() == alone.keys() and all(torch.equal(vae[n], alone[n]) for n in vae),
        "not_video": loaded.vae.not_video,
        "notes": loaded.notes,
        "said": {},
    }
    cpu = torch.device("cpu")
    source = transformer_from_file(Path(FOLDER) / "everything.safetensors")
    for precision in ("auto", "fp8", "int8", "bf16"):
        resolved = loading._precision(LoadRequest(names[0], precision=precision), source, cpu)
        result["said"][precision] = loading._precision_notes(source, resolved)
print("RESULT", json.dumps(result))
"""


def everything(path, host, folder) -> None:
    save_comfyui_vae(host, DEMO, folder / "vae.safetensors")
    vae = {f"vae.{name}": tensor for name, tensor in load_file(folder / "vae.safetensors").items()}
    encoder = {ENCODER + BIAS: torch.arange(512, dtype=torch.bfloat16), ENCODER + NORM: torch.ones(1280)}
    write(path, "fp8 mixed", "model.diffusion_model.", **encoder, **vae)


@pytest.fixture(scope="module")
def loaded(host, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("checkpoints")
    everything(folder / "everything.safetensors", host, tmp_path_factory.mktemp("vae"))
    vae = folder.parent / "vae0" / "vae.safetensors"
    constants = f"FOLDER, VAE, BIAS = {str(folder)!r}, {str(vae)!r}, {BIAS!r}\n"
    return json.loads(run_in_comfyui(host, constants + CODE, 300).split("RESULT", 1)[1])


def test_encoder_and_vae_come_from_the_same_file(loaded):
    assert loaded["names"] == ["checkpoint: everything.safetensors"]
    assert loaded["bias"] == torch.arange(512, dtype=torch.bfloat16).tolist()
    assert loaded["vae"]
    assert loaded["not_video"]


def test_the_node_says_what_the_file_is(loaded):
    first, second, *_ = loaded["notes"]
    assert first.startswith("everything (2511, by the file's mark), fp8, 0.01 GiB")
    assert second == "Precision fp8: as stored in the file, 8 linears of the blocks in fp8"
    said = loaded["said"]
    assert said["auto"] == said["fp8"] == [second]
    assert said["int8"][0].startswith(
        "Warning: the file has 8 linears of the blocks in fp8, which are quantized again to int8"
    )
    assert said["bf16"] == [
        "The file has 8 linears of the blocks in fp8; they were made bf16 while loading, which restores no precision."
    ]


def test_a_checkpoint_without_an_encoder_says_so(client, models):
    write(
        models / "checkpoints" / "half.safetensors", "fp8 mixed", "model.diffusion_model.", **{"vae.x": torch.zeros(1)}
    )
    graph = small_edit(client)
    said = failure(client, changed(graph, "loader", model="checkpoint: half.safetensors"))
    assert said.startswith(
        "[QE_INPUT] checkpoint: half.safetensors holds the transformer and a VAE only. Choose a text encoder"
    )
