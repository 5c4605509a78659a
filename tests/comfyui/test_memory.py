"""How the pack's weights live in a real ComfyUI: counted, kept, freed, read again."""

import time

import numpy as np
import pytest
from array_client import ArrayClient
from edits import between, changed, edited, failure, fresh, look, picture, reads, run_fresh, small_edit, starved
from graphs import node
from safetensors.torch import save_file
from test_faults import switch_inputs, transformer_state
from test_lora import lora_state

pytestmark = pytest.mark.server
LORAS = ("memory 1.safetensors", "memory 2.safetensors")


@pytest.fixture(scope="module", autouse=True)
def lora_files(models):
    for seed, name in enumerate(LORAS):
        save_file(lora_state(seed), models / "loras" / name)


def with_lora(graph, name: str, strength: float = 1.0):
    return between(graph, ("loader", 0), "QwenEditLoraSwitch", "model", **switch_inputs(name, strength))


def free(client, models: bool = True, cache: bool = True) -> dict:
    """`/free`, then what is held once it has been carried out (at most 20 s later)."""
    client.post("/free", {"unload_models": models, "free_memory": cache})
    return wait_for(client, lambda seen: not any(k.startswith("QwenEdit") for k in seen["loaded"]))


def wait_for(client, happened) -> dict:
    end = time.monotonic() + 20
    while not happened(seen := look(client)):
        assert time.monotonic() < end, seen
        time.sleep(0.1)
    return seen


def free_all(client) -> dict:
    """`/free` until the graph cache is gone too: ComfyUI's worker can sleep through the second of its two flags."""

    def nothing_left(seen):
        if seen["shells"]:
            client.free()
            time.sleep(0.5)
        return not seen["shells"]

    return wait_for(client, nothing_left)


def weights_held(seen: dict) -> bool:
    return any(not empty for shells in seen["shells"].values() for empty in shells)


def test_models_and_loras_are_in_comfyuis_accounting(client, server, graph):
    edited(client, with_lora(graph, LORAS[0]))
    assert {"QwenEditModel", "FolderTextModel", "ResidentLora"} <= set(look(client)["loaded"])
    assert "Requested to load QwenEditModel" in server.log.read_text(errors="replace")


def test_a_model_of_comfyuis_loader_samples_between_two_of_our_samplings(client, models, graph, good):
    save_file(transformer_state(), models / "diffusion_models" / "memory.safetensors")

    def sampled(graph, name: str, sampler: dict, latent: list):
        sampler["inputs"]["latent_image" if "latent_image" in sampler["inputs"] else "latent"] = latent
        graph[name] = sampler
        graph[f"{name} decode"] = node("VAEDecode", samples=[name, 0], vae=["loader", 2])
        graph[f"{name} save"] = node("SaveImage", images=[f"{name} decode", 0], filename_prefix=name)

    def with_native(graph, after: list):
        graph = fresh(graph)
        graph["unet"] = node("UNETLoader", unet_name="memory.safetensors", weight_dtype="default")
        conditioning = dict(positive=["encode", 0], negative=["encode", 1], latent_image=None)
        settings = dict(seed=5, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0)
        graph["after"] = node("ProbePass", value=["encode", 2], nonce="1", after=after)
        sampled(graph, "native", node("KSampler", model=["unet", 0], **conditioning, **settings), ["after", 0])
        return graph

    def pictures(graph) -> dict[str, np.ndarray]:
        result = client.run(graph, timeout_s=120)
        return {ref.node: array for ref, array in zip(result.images(), client.arrays(result), strict=True)}

    alone = with_native(graph, ["encode", 2])
    for name in ("sampler", "decode", "save"):
        del alone[name]
    expected = pictures(alone)["native save"]
    both = with_native(graph, ["sampler", 0])
    both["then"] = node("ProbePass", value=["encode", 2], nonce="2", after=["native", 0])
    sampled(both, "again", node("QwenEditSampler", **both["sampler"]["inputs"]), ["then", 0])
    found = pictures(both)
    assert np.array_equal(found["save"], good)
    assert np.array_equal(found["again save"], good)
    assert np.array_equal(found["native save"], expected)
    assert np.abs(expected - good).max() > 0.1
    assert {"QwenEditModel", "QwenImage"} <= set(look(client)["loaded"])


def test_free_drops_what_waits_in_ram_since_memory_ran_out(client, server, graph):
    """ComfyUI then unloads everything, and has none of it in its list any more."""
    before = edited(client, graph)
    failure(client, starved(graph, 2, "raised"))
    seen = wait_for(client, lambda seen: not any(k.startswith("QwenEdit") for k in seen["loaded"]))
    assert weights_held(seen)
    client.post("/free", {"unload_models": True})
    wait_for(client, lambda seen: not weights_held(seen))
    assert np.array_equal(edited(client, graph), before)


def test_free_drops_what_a_cached_loader_has_brought_back(client, server, graph):
    """Its node does not run again, so that what it keeps knows nothing of the weights that its MODEL and CLIP read."""
    graph = changed(graph, "loader", offload="text encoder")
    edited(client, graph)
    free(client, cache=False)
    before = edited(client, changed(graph, "sampler", seed=7))
    assert weights_held(look(client))
    client.post("/free", {"unload_models": True})
    wait_for(client, lambda seen: not weights_held(seen))
    assert np.array_equal(edited(client, changed(graph, "sampler", seed=7)), before)


def test_free_drops_everything_and_the_next_edit_reads_again(client, server, graph):
    before = edited(client, graph)
    with_one = edited(client, with_lora(graph, LORAS[0]))
    off = edited(client, with_lora(graph, LORAS[1], strength=0.0))  # resident, but in no forward
    assert np.array_equal(off, before)
    count = reads(server)
    seen = free_all(client)
    assert (seen["owned"], seen["loras"]) == (0, 0)
    assert np.array_equal(edited(client, graph), before)
    assert reads(server) == count + 1
    assert np.array_equal(edited(client, with_lora(graph, LORAS[0])), with_one)
    assert reads(server) == count + 1


def test_free_with_a_cached_graph_leaves_empty_shells_that_fill_again(client, server, graph):
    """Only unload_models: the graph cache still holds MODEL and CLIP, without their weights."""
    graph = with_lora(graph, LORAS[0])
    before = edited(client, graph)
    count = reads(server)
    seen = free(client, cache=False)
    assert seen["shells"]["QwenEditModel"]
    assert not weights_held(seen), seen
    assert np.array_equal(edited(client, graph), before)
    assert reads(server) == count + 1


def test_free_twice_and_right_before_a_prompt(client, graph):
    before = edited(client, graph)
    for _ in range(3):
        for cache in (True, False):
            client.post("/free", {"unload_models": True, "free_memory": cache})
            client.post("/free", {"unload_models": True, "free_memory": cache})
            assert np.array_equal(edited(client, graph), before)
    free_all(client)
    free(client)  # nothing is there to be freed
    assert np.array_equal(edited(client, graph), before)


def test_free_while_a_prompt_runs_waits_for_it(client, graph):
    before = edited(client, graph)
    prompt_id = client.queue(changed(graph, "sampler", steps=30, seed=8))
    client.free()
    assert client.wait(prompt_id, timeout_s=120).images()
    assert np.array_equal(edited(client, graph), before)


def test_another_clients_prompt_in_between_reads_nothing_from_disk(client, server, graph):
    before = edited(client, graph)
    count = reads(server)
    with ArrayClient(server.url) as other:
        name = other.upload_array(picture(9, 40, 40))
        scale = node("ImageScale", image=["1", 0], upscale_method="lanczos", width=50, height=50, crop="disabled")
        save = node("SaveImage", images=["2", 0], filename_prefix="other")
        other.run({"1": node("LoadImage", image=name), "2": scale, "3": save}, timeout_s=60)
        edited(other, small_edit(other, picture(4), prompt="mirror it"))
    assert np.array_equal(edited(client, graph), before)
    assert reads(server) == count


@pytest.mark.parametrize("offload", ["none", "text encoder", "stream"])
def test_every_offload_gives_the_same_picture(client, graph, offload):
    before = edited(client, graph)
    lora = edited(client, with_lora(graph, LORAS[0]))
    other = changed(graph, "loader", offload=offload)
    assert np.array_equal(edited(client, other), before)
    assert np.array_equal(edited(client, with_lora(other, LORAS[0])), lora)
    # a cached MODEL whose weights are gone
    free(client, cache=False)
    assert np.array_equal(edited(client, other), before)


def test_the_text_encoder_leaves_after_encoding_when_asked(client, graph):
    free(client)
    edited(client, changed(graph, "loader", offload="text encoder"))
    assert "FolderTextModel" not in look(client)["loaded"]
    edited(client, graph)
    assert "FolderTextModel" in look(client)["loaded"]


def test_resident_memory_levels_off(client, graph):
    """Forty edits with alternating LoRAs and seeds: after the first ones nothing grows."""
    measured = []
    for index in range(40):
        one = with_lora(changed(graph, "sampler", seed=index), LORAS[index % 2])
        run_fresh(client, one)
        if index in (14, 39):
            measured.append(look(client))
    first, last = measured
    assert last["rss"] - first["rss"] < 40 * 2**20  # the demo model alone has 28 MiB of weights
    assert last["threads"] <= first["threads"] + 2
    assert last["loras"] == first["loras"]
    assert {k: len(v) for k, v in last["shells"].items()} == {k: len(v) for k, v in first["shells"].items()}


def test_the_collector_passes_over_what_imports_made_and_over_no_model(client, graph):
    edited(client, graph)
    seen = look(client)
    assert seen["collector"]["aside"] > 300_000
    assert seen["collector"]["looks at"] < seen["collector"]["aside"] / 2
    assert seen["shells"]["QwenEditModel"]  # found among what it looks at
