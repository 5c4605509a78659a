"""Random values in random places of an edit, queued for real (hypothesis): refused, an error with a word, or an edit.

A longer run: QWEN_EDIT_FUZZ=2000 pytest tests/comfyui/test_fuzz_prompts.py.
"""

import os
import re

import numpy as np
import pytest
from comfy_client import ExecutionFailed, PromptRejected
from edits import changed, edited, run_fresh, small_edit
from graphs import node
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.server
EXAMPLES = int(os.environ.get("QWEN_EDIT_FUZZ", "25"))

INPUTS = {
    "loader": ["model", "text_encoder", "vae", "profile", "precision", "attention", "offload", "model_version"],
    "encode": ["prompt", "negative", "width", "height", "reference_size"],
    "sampler": ["preset", "seed", "steps", "true_cfg_scale", "shift"],
}
places = st.sampled_from([(which, name) for which, names in INPUTS.items() for name in names])
# Sizes that a server on two cores can make, besides those that are refused.
numbers = st.integers(-3, 3) | st.sampled_from([16, 32, 64, 2**31, 2**64, -(2**70)]) | st.floats()
texts = st.text(max_size=20) | st.sampled_from(
    ["auto", "none", "../x", "folder: x", "demo: x", "fp8", "int8", "Lightning 4"]
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
    return small_edit(client, steps=1, true_cfg_scale=1.0)


@pytest.fixture
def good(client, graph):
    before = edited(client, graph)
    yield before
    assert np.array_equal(edited(client, graph), before)


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
def test_no_values_break_the_server(client, server, graph, good, changes):
    """Each value as a widget, or through a link, past all of ComfyUI's checks."""
    fuzzed = graph
    for number, ((which, name), (value, linked)) in enumerate(changes.items()):
        if linked:
            fuzzed = fuzzed | {f"value{number}": node("ProbeJson", value=[value])}
            fuzzed = changed(fuzzed, which, **{name: [f"value{number}", 0]})
        elif value is not None:
            fuzzed = changed(fuzzed, which, **{name: value})
    try:
        run_fresh(client, fuzzed)
    except PromptRejected:
        pass
    except ExecutionFailed as failed:
        said = str(failed.details["exception_message"])
        # ComfyUI's own cast of a widget's value is no matter of the pack
        assert re.match(r"\[QE_(INPUT|WEIGHTS|NAN|LORA)\]", said), (changes, said)
    assert server.running
