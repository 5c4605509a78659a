"""The nodes against diffusers' own pipeline and against ComfyUI's own nodes: same weights, seed and sizes, fp32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from array_client import ArrayClient
from comfy_server import ComfyServer
from graphs import edit_graph, loader, node
from PIL import Image
from safetensors.torch import load_file

from qwen_edit.recipes import PRESETS
from training.pipeline import load_reference_pipeline, reference_area

pytestmark = pytest.mark.slow

DEMO = Path(__file__).parents[2] / "demo_model"
SEED = 11
LATENT_TOLERANCE = 1e-5
PIXEL_TOLERANCE = 2 / 255


@pytest.fixture(scope="module")
def pipeline():
    return load_reference_pipeline(DEMO)


def photograph(width: int, height: int, turn: int = 0) -> np.ndarray:
    skimage_data = pytest.importorskip("skimage.data")
    picture = Image.fromarray(skimage_data.astronaut()).rotate(90 * turn).resize((width, height))
    return np.asarray(picture, dtype=np.float32) / 255


def run(client: ArrayClient, server: ComfyServer, graph: dict, source: list) -> tuple[torch.Tensor, np.ndarray]:
    """The LATENT at ``source`` as ComfyUI's SaveLatent stores it, and the saved picture."""
    graph["save_latent"] = node("SaveLatent", samples=source, filename_prefix="latents/same")
    before = set(server.output.glob("latents/*.latent"))
    (picture,) = client.pictures(graph)
    (written,) = set(server.output.glob("latents/*.latent")) - before
    return load_file(written)["latent_tensor"].float(), picture


def statistics(pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    config = pipeline.vae.config
    return tuple(torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))


@pytest.mark.parametrize("count", [1, 2])
def test_standard_preset_equals_the_diffusers_pipeline(client, server, pipeline, count):
    width, height = 160, 128
    pictures = [photograph(width, height), photograph(128, 160, turn=1)][:count]
    names = [client.upload_array(p) for p in pictures]
    graph = edit_graph(names, "make it black and white", preset="standard", seed=SEED)
    raw, our_picture = run(client, server, graph, ["sampler", 0])
    mean, std = statistics(pipeline)
    ours = (raw - mean) / std

    images = [Image.fromarray((p * 255).round().astype(np.uint8)) for p in pictures]
    recipe = PRESETS["standard"]
    arguments = dict(
        image=images,
        prompt="make it black and white",
        negative_prompt=" ",
        true_cfg_scale=recipe.true_cfg_scale,
        num_inference_steps=recipe.steps,
        width=width,
        height=height,
    )
    with reference_area(width * height):
        packed = pipeline(**arguments, generator=torch.Generator().manual_seed(SEED), output_type="latent").images
    theirs = pipeline._unpack_latents(packed, height, width, pipeline.vae_scale_factor)
    decoded = pipeline.vae.decode(theirs * std + mean).sample[:, :, 0]
    (picture,) = pipeline.image_processor.postprocess(decoded.detach(), output_type="np")

    assert (ours - theirs).abs().max() < LATENT_TOLERANCE * theirs.abs().max()
    assert np.abs(our_picture - picture).max() <= PIXEL_TOLERANCE


def native_encoding(names: list[str], prompt: str) -> dict:
    graph = {"loader": loader(), "latent": node("EmptySD3LatentImage", width=96, height=128, batch_size=1)}
    for index, name in enumerate(names, 1):
        graph[f"picture_{index}"] = node("LoadImage", image=name)
    pictures = {f"image{i}": [f"picture_{i}", 0] for i in range(1, len(names) + 1)}
    for which, text in (("positive", prompt), ("negative", " ")):
        inputs = dict(clip=["loader", 1], vae=["loader", 2], prompt=text)
        graph[which] = node("TextEncodeQwenImageEditPlus", **inputs, **pictures)
    return graph


def ksampler(model: list, **settings) -> dict:
    inputs = dict(positive=["positive", 0], negative=["negative", 0], latent_image=["latent", 0], seed=SEED)
    fixed = dict(sampler_name="euler", scheduler="simple", denoise=1.0)
    return node("KSampler", model=model, **inputs, **fixed, **settings)


def both(client: ArrayClient, server: ComfyServer, graph: dict) -> list[torch.Tensor]:
    """The LATENTs of the nodes "ours" and "native" of one graph."""
    results = []
    for which in ("ours", "native"):
        graph[f"save_{which}"] = node("SaveLatent", samples=[which, 0], filename_prefix=f"latents/{which}")
    client.run(graph)
    for which in ("ours", "native"):
        newest = max(server.output.glob(f"latents/{which}*.latent"), key=lambda p: p.stat().st_mtime_ns)
        results.append(load_file(newest)["latent_tensor"].float())
    return results


def test_comfyui_template_preset_equals_native_nodes(client, server):
    """Native encode nodes, then our sampler beside ComfyUI's template (AuraFlow shift, CFGNorm, KSampler)."""
    graph = native_encoding([client.upload_array(photograph(96, 128))], "mirror it")
    shared = dict(model=["loader", 0], positive=["positive", 0], negative=["negative", 0], latent=["latent", 0])
    settings = dict(preset="ComfyUI template", steps=4, true_cfg_scale=0.0, shift=0.0, seed=SEED)
    graph["ours"] = node("QwenEditSampler", **shared, **settings)
    graph["shift"] = node("ModelSamplingAuraFlow", model=["loader", 0], shift=3.1)
    graph["norm"] = node("CFGNorm", model=["shift", 0], strength=1.0)
    graph["native"] = ksampler(["norm", 0], steps=4, cfg=4.0)
    ours, native = both(client, server, graph)
    assert (ours - native).abs().max() < LATENT_TOLERANCE * native.abs().max()


@pytest.mark.parametrize(("preset", "steps"), [("draft", 7), ("Lightning 4", 0)])
def test_step_preset_gives_native_samplers_the_same_picture(client, server, preset, steps):
    graph = edit_graph([client.upload_array(photograph(96, 96))], "invert the colours")
    overrides = dict(preset=preset, steps=steps, true_cfg_scale=0.0, shift=0.0)
    graph["ours"] = graph.pop("sampler")
    graph["ours"]["inputs"] |= overrides | {"seed": SEED}
    del graph["decode"], graph["save"]
    graph["step_preset"] = node("QwenEditStepPreset", model=["loader", 0], latent=["encode", 2], **overrides)
    graph["native"] = ksampler(["step_preset", 0], steps=["step_preset", 2], cfg=["step_preset", 3])
    graph["native"]["inputs"] |= {
        "positive": ["encode", 0],
        "negative": ["encode", 1],
        "latent_image": ["encode", 2],
    }
    ours, native = both(client, server, graph)
    assert (ours - native).abs().max() < 1e-4 * native.abs().max()
