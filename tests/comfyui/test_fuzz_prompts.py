"""Random values in random places of an edit, queued for real (hypothesis): refused, an error with a word, or an edit.

A longer run: QWEN_EDIT_FUZZ=2000 pytest tests/comfyui/test_fuzz_prompts.py.
"""

import os
import re

import numpy as np
import pytest
from comfy_client import ExecutionFailed, PromptRejected
from edits import changed, edited
from every_node import every_node, only, widgets
from graphs import node
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.server
EXAMPLES = int(os.environ.get("QWEN_EDIT_FUZZ", "25"))

INPUTS = {
    "loader": ["model", "text_encoder", "vae", "profile", "precision", "attention", "offload", "model_version"],
    "encode": ["prompt", "negative", "width", "height", "reference_size"],
    "sampler": ["preset", "seed", "steps", "true_cfg_scale", "shift"],
    "accelerate": ["attention"],
    "switch": ["lora_1", "strength_1", "lora_2", "strength_2", "lora_3", "strength_3", "lora_4", "strength_4", "mode"],
    "cache": ["tolerance"],
    "preset": ["preset", "steps", "true_cfg_scale", "shift"],
    "sweep": ["sweep", "preset", "seed", "true_cfg_scale", "shift", "theme"],
    "batch": ["source", "prompt", "negative", "preset", "seed", "megapixels", "width", "height", "reference_size", "output", "steps",
              "true_cfg_scale", "shift", "wave", "together"],
    "resize": ["target", "megapixels", "longest_side", "fit"],
    "restore": ["feather"],
    "logger": ["label", "include_text"],
    "report": ["export", "theme"],
    "keep": ["filename_prefix", "format"],
}  # fmt: skip
places = st.sampled_from([(which, name) for which, names in INPUTS.items() for name in names])
# Sizes that a server on two cores can make, besides those that are refused.
numbers = st.integers(-3, 3) | st.sampled_from([16, 32, 64, 2**31, 2**64, -(2**70)]) | st.floats()
texts = st.text(max_size=20) | st.sampled_from(
    ["auto", "none", "../x", "folder: x", "demo: x", "fp8", "int8", "Lightning 4", "2, 1", "JSON"]
)
values = (
    numbers
    | texts
    | st.booleans()
    | st.none()
    | st.lists(st.integers(), max_size=3)
    | st.dictionaries(texts, numbers, max_size=2)
)


@pytest.fixture
def graph(client):
    return every_node(client)


@pytest.fixture
def good(client, graph):
    before = edited(client, only(graph, "save"))
    yield before
    assert np.array_equal(edited(client, only(graph, "save")), before)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.dictionaries(places, st.tuples(values, st.booleans()), min_size=1, max_size=3))
@example({("sampler", "steps"): (True, True)})
@example({("encode", "prompt"): (None, True)})
@example({("loader", "model_version"): ([1], True)})
@example({("sampler", "true_cfg_scale"): ("4", True)})
@example({("sweep", "sweep"): ("9" * 5000, False)})
def test_no_values_break_the_server(client, server, graph, good, changes):
    """Each value as a widget, or through a link, past all of ComfyUI's checks."""
    fuzzed = graph
    for number, ((which, name), (value, linked)) in enumerate(changes.items()):
        assume(name != "source" or not isinstance(value, str) or value.strip(" ./"))  # all that other tests uploaded
        if linked:
            fuzzed = fuzzed | {f"value{number}": node("ProbeJson", value={"is": value})}
            fuzzed = changed(fuzzed, which, **{name: [f"value{number}", 0]})
        elif value is not None:
            fuzzed = changed(fuzzed, which, **{name: value})
    try:
        client.run(only(fuzzed, *{which for which, _ in changes}), timeout_s=120)
    except PromptRejected:
        pass
    except ExecutionFailed as failed:
        said = str(failed.details["exception_message"])
        # ComfyUI's own cast of a widget's value is no matter of the pack
        assert re.match(r"\[QE_(INPUT|WEIGHTS|NAN|LORA)\]", said), (changes, said)
    assert server.running


def test_every_widget_of_every_node_is_fuzzed(graph):
    fuzzed = {(which, name) for which, names in INPUTS.items() for name in names}
    assert {(which, name) for which, name, _ in widgets(graph)} == fuzzed
