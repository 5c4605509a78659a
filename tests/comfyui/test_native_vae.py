"""Our VAE objects on pictures (2D) against ComfyUI's own on the same weights (causal 3D): fp32, on the CPU."""

import json
from pathlib import Path

import pytest
from comfy_process import run_in_comfyui, save_comfyui_vae

pytestmark = [pytest.mark.server, pytest.mark.slow]

DEMO = Path(__file__).parents[2] / "demo_model"
TOLERANCE = 5e-6  # |ours - ComfyUI's| / |ComfyUI's|; rounding alone gives up to 2e-6
SIZES = [(64, 96), (72, 104), (8, 200), (136, 56)]

CODE = """
import json
import comfy.sd
import comfy.utils
from comfy.ldm.wan.vae import Decoder3d, Encoder3d, WanVAE
from pack.nodes.host.picture_vae import PictureDecoder, PictureEncoder
from pack.nodes.host.vae import load_single_vae, load_vae

native = comfy.sd.VAE(sd=comfy.utils.load_torch_file(SINGLE))
native.not_video = True
g = torch.Generator().manual_seed(1)


def error(ours, call):
    mine, theirs = call(ours), call(native)
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, (mine.shape, theirs.shape)
    return ((mine - theirs).norm() / theirs.norm()).item()


def compare(ours):
    found = {}
    for height, width in SIZES:
        pixels, latents = torch.rand(2, height, width, 3, generator=g), torch.randn(2, 16, 1, height // 8, width // 8, generator=g)
        found[f"encode {height}x{width}"] = error(ours, lambda vae: vae.encode(pixels))
        found[f"decode {height}x{width}"] = error(ours, lambda vae: vae.decode(latents))
    pixels, latents = torch.rand(1, 200, 136, 3, generator=g), torch.randn(1, 16, 1, 25, 17, generator=g)
    found["encode tiled"] = error(ours, lambda vae: vae.encode_tiled(pixels, tile_x=64, tile_y=64, overlap=16))
    found["decode tiled"] = error(ours, lambda vae: vae.decode_tiled(latents, tile_x=8, tile_y=8, overlap=2))
    return found


def compare_videos(ours):
    found = {}
    for frames in (2, 5):
        pixels, latents = torch.rand(1, 3, frames, 48, 40, generator=g), torch.randn(1, 16, frames, 6, 5, generator=g)
        found[f"encode {frames}"] = error(ours, lambda vae: vae.first_stage_model.encode(pixels))
        found[f"decode {frames}"] = error(ours, lambda vae: vae.decode(latents))
    return found


def patched(ours):
    # as ComfyUI leaves a patched layer whose weights wait in RAM
    layers = [vae.first_stage_model.decoder.middle[0].residual[2] for vae in (ours, native)]
    for layer in layers:
        layer.weight_function = [lambda weight: weight.flip(0)]
    latents = torch.randn(1, 16, 1, 8, 8, generator=g)
    found = error(ours, lambda vae: vae.decode(latents))
    moved = ours.decode(latents)
    for layer in layers:
        layer.weight_function = []
    return found, (moved - ours.decode(latents)).norm().item() / moved.norm().item()


with torch.inference_mode():
    folder, single = load_vae(Path(FOLDER)), load_single_vae(Path(SINGLE))
    result = {"folder": compare(folder), "single": compare(single), "videos": compare_videos(folder)}
    result["patched"] = patched(folder)
assert type(single.first_stage_model.encoder) is type(folder.first_stage_model.encoder) is PictureEncoder
assert type(single.first_stage_model.decoder) is type(folder.first_stage_model.decoder) is PictureDecoder
assert type(native.first_stage_model) is WanVAE and type(native.first_stage_model.encoder) is Encoder3d and type(native.first_stage_model.decoder) is Decoder3d
shapes = lambda vae: {name: tensor.shape for name, tensor in vae.get_sd().items()}
assert shapes(folder) == shapes(single) == shapes(native)
assert folder.model_size() == native.model_size()
print("RESULT", json.dumps(result))
"""


@pytest.fixture(scope="module")
def differences(host, tmp_path_factory):
    single = tmp_path_factory.mktemp("vae") / "demo.safetensors"
    save_comfyui_vae(host, DEMO, single)
    given = f"SIZES, FOLDER, SINGLE = {SIZES}, {str(DEMO)!r}, {str(single)!r}\n"
    return json.loads(run_in_comfyui(host, given + CODE).split("RESULT", 1)[1])


@pytest.mark.parametrize("loaded_from", ["folder", "single"])
def test_pictures_equal_comfyuis_own_vae(differences, loaded_from):
    compared = differences[loaded_from]
    assert len(compared) == 2 * len(SIZES) + 2
    assert max(compared.values()) < TOLERANCE, compared


def test_several_frames_take_comfyuis_own_path(differences):
    videos = differences["videos"]
    # of two frames ComfyUI encodes the first alone
    assert 0 < videos.pop("encode 2") < TOLERANCE
    assert len(videos) == 3
    assert set(videos.values()) == {0.0}, videos


def test_patched_weights_count(differences):
    error, moved = differences["patched"]
    assert error < TOLERANCE
    assert moved > 1000 * TOLERANCE
