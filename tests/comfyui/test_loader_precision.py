"""The loader's profiles and precisions on the real server: the demo model, on the CPU, where 8- and 4-bit products are
computed exactly in float."""

import itertools

import numpy as np
import pytest
from comfy_client import ExecutionFailed
from edits import between, changed, edited, failure, note, run_fresh, small_edit
from graphs import node
from safetensors.torch import save_file
from test_lora import lora_state
from test_memory import free, free_all

_nonce = itertools.count(1)
pytestmark = pytest.mark.server

FORMS = ("fp8", "int8", "w4a4", "w4a8")
# mean difference from the picture in fp32, at most; another picture of the same kind is 0.1 away
MOST = {"fp8": 0.02, "int8": 0.02, "w4a4": 0.08, "w4a8": 0.05}


@pytest.fixture
def graph(client):
    return small_edit(client, steps=1, true_cfg_scale=1.0)


@pytest.fixture(scope="module")
def lora(models) -> str:
    save_file(lora_state(1), models / "loras" / "precision.safetensors")
    return "precision.safetensors"


@pytest.mark.parametrize("form", FORMS)
def test_each_form_edits_and_the_node_says_which_runs(client, graph, form):
    exact = edited(client, graph)
    result = run_fresh(client, changed(graph, "loader", precision=form))
    (picture,) = client.arrays(result)
    assert f", {form}, " in note(result, "loader")
    assert "Warning: precision" not in note(result, "loader")
    error = np.abs(picture - exact).mean()
    assert 0 < error < MOST[form]


@pytest.mark.parametrize(
    ("profile", "form"), [("quality", "fp32"), ("fast", "fp8"), ("small", "w4a8"), ("auto", "fp32")]
)
def test_each_profile_says_what_it_chose(client, graph, profile, form):
    result = run_fresh(client, changed(graph, "loader", profile=profile, precision="auto"))
    assert client.arrays(result)[0].shape == (64, 64, 3)
    assert f", {form}, " in note(result, "loader")
    assert f"Precision {form}: " in note(result, "loader")


def native_lora(graph, name: str):
    return between(graph, ("loader", 0), "LoraLoaderModelOnly", "model", lora_name=name, strength_model=0.5)


def test_a_native_lora_leaves_quantized_weights_as_they_were(client, graph, lora):
    graph = changed(graph, "loader", precision="fp8")
    before = edited(client, graph)
    with_lora = edited(client, native_lora(graph, lora))
    assert np.abs(with_lora - before).mean() > 0.01
    assert np.array_equal(edited(client, graph), before)
    assert np.array_equal(edited(client, native_lora(graph, lora)), with_lora)


def lora_on_conditioning(graph, name: str):
    hooked = changed(graph, "sampler", positive=["hooked", 0])
    hooked["hook"] = node("CreateHookLoraModelOnly", lora_name=name, strength_model=0.5)
    hooked["hooked"] = node(
        "ConditioningSetProperties",
        cond_NEW=["encode", 0],
        hooks=["hook", 0],
        strength=1.0,
        set_cond_area="default",
    )
    return hooked


def test_a_lora_on_conditioning_equals_the_native_one_on_the_model(client, graph, lora):
    """ComfyUI patches and restores the weights inside a sampling, the modulation's among them."""
    before, with_lora = edited(client, graph), edited(client, native_lora(graph, lora))
    assert np.abs(edited(client, lora_on_conditioning(graph, lora)) - with_lora).max() <= 1 / 255
    assert np.array_equal(edited(client, graph), before)


def test_a_lora_on_conditioning_of_quantized_weights_is_refused(client, graph, lora):
    """ComfyUI restores what a hook has changed in place, which leaves out the scales of quantized weights."""
    graph = changed(graph, "loader", precision="fp8")
    before = edited(client, graph)
    said = failure(client, lora_on_conditioning(graph, lora))
    assert said.startswith("[QE_INPUT] A LoRA on conditioning")
    assert "fp8" in said
    assert np.array_equal(edited(client, graph), before)


def test_weights_that_are_read_and_quantized_again_are_the_same(client, graph, lora):
    graph = changed(graph, "loader", precision="fp8")
    with_lora = edited(client, native_lora(graph, lora))
    free(client, cache=False)  # a cached MODEL whose weights are gone
    assert np.array_equal(edited(client, native_lora(graph, lora)), with_lora)
    free_all(client)
    assert np.array_equal(edited(client, native_lora(graph, lora)), with_lora)


def test_streamed_blocks_give_the_same_picture(client, graph, lora):
    graph = changed(graph, "loader", precision="fp8")
    streamed = changed(graph, "loader", offload="stream")
    for one, other in ((graph, streamed), (native_lora(graph, lora), native_lora(streamed, lora))):
        assert np.array_equal(edited(client, other), edited(client, one))


def test_a_workflow_saved_before_the_quantized_forms_still_runs(client, graph):
    """The values that the combos had then; a server that refuses them says so before it runs anything."""
    for precision, profile in (("auto", "quality"), ("bf16", "auto"), ("fp16", "auto"), ("fp32", "quality")):
        client.interrupt(client.queue(changed(graph, "loader", precision=precision, profile=profile)))
    assert edited(client, graph).shape == (64, 64, 3)


# Out of memory


def failing(graph, times: int):
    model = graph["sampler"]["inputs"]["model"]
    failing = changed(graph, "sampler", model=["failing", 0])
    return failing | {"failing": node("ProbeOutOfMemory", model=model, times=times, nonce=str(next(_nonce)))}


def test_out_of_memory_is_tried_once_more_and_said(client, graph, lora):
    streamed = native_lora(changed(graph, "loader", precision="fp8", offload="stream"), lora)
    for one in (graph, streamed):
        good = edited(client, one)
        before = len(client.events)
        retried = edited(client, failing(one, 1))
        assert np.abs(retried - good).max() <= 1 / 255
        said = [e.data for e in client.events[before:] if e.type == "progress_text"]
        assert [d["node"] for d in said if d["text"].startswith("Out of memory: trying once more")] == ["sampler"]
        assert np.array_equal(edited(client, one), good)


def test_out_of_memory_twice_is_comfyuis_error_and_the_next_edit_works(client, graph):
    good = edited(client, graph)
    with pytest.raises(ExecutionFailed, match="OutOfMemoryError"):
        run_fresh(client, failing(graph, 2))
    assert np.array_equal(edited(client, graph), good)
