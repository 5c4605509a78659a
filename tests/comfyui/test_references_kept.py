"""QwenEditReferenceCache on the real server: our MODEL and an accelerated one, our sampler and KSampler."""

import numpy as np
import pytest
from array_client import ArrayClient
from comfy_client import ExecutionFailed
from edits import changed, edited, picture, small_edit
from graphs import node
from test_accelerate import FAST, PLAIN, TEXT_WIDTH, Samplings, difference, texts, weights  # noqa: F401 (a fixture)

pytestmark = pytest.mark.server
STEPS = 8


def cached(graph: dict, tolerance: float) -> dict:
    graph = changed(graph, "sampler", model=["cache", 0])
    graph["cache"] = node("QwenEditReferenceCache", model=["loader", 0], tolerance=tolerance)
    return graph


def said(client: ArrayClient) -> list[str]:
    return [text for _, text in texts(client) if text.startswith("Reference cache")]


@pytest.fixture(scope="module")
def client(server):
    with ArrayClient(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def edit(client) -> dict:
    return small_edit(client, picture(), picture(seed=5), steps=STEPS)


@pytest.fixture(scope="module")
def exact(client, edit) -> np.ndarray:
    return edited(client, edit)


def test_it_says_how_often_it_helped_and_changes_the_picture_a_little(client, edit, exact):
    client.events.clear()
    found = edited(client, cached(edit, 0.3))
    (line,) = said(client)
    reused, forwards = (int(word) for word in line.split() if word.isdigit())
    assert forwards == 2 * STEPS  # with and without the instruction
    assert 4 <= reused < forwards
    assert 0 < np.abs(found - exact).max() < 0.15


def test_a_tolerance_of_zero_is_exact(client, edit, exact):
    client.events.clear()
    assert np.array_equal(edited(client, cached(edit, 0.0)), exact)
    assert said(client) == []


def test_a_tolerance_smaller_than_any_step_changes_no_bit(client, edit, exact):
    client.events.clear()
    assert np.array_equal(edited(client, cached(edit, 0.001)), exact)
    (line,) = said(client)
    assert "Choose more steps or a tolerance above 0.001" in line


def test_the_model_without_it_is_as_before(client, edit, exact):
    edited(client, cached(edit, 0.5))
    assert np.array_equal(edited(client, edit), exact)


def test_twice_the_same(client, edit):
    once, again = (edited(client, cached(edit, 0.3)) for _ in range(2))
    assert np.array_equal(once, again)


def test_behind_accelerate_with_ksampler(server, weights):  # noqa: F811
    made = Samplings()
    made.add("cache", "QwenEditReferenceCache", model=FAST, tolerance=0.3)
    made.add("exact cache", "QwenEditReferenceCache", model=FAST, tolerance=0.001)
    for name, model in (("without", FAST), ("with", ["cache", 0]), ("exact", ["exact cache", 0])):
        made.sample(name, model, steps=6, cfg=3.0)
    with ArrayClient(server.url) as client:
        results = made.run(client, server)
        lines = said(client)
    assert difference(results["exact"], results["without"]) == 0
    assert 1e-7 < difference(results["with"], results["without"]) < 0.1
    assert sorted("Choose" in line for line in lines) == [False, True]


def test_each_conditioning_has_its_own_also_where_comfyui_gives_two_the_same_id(server, weights):  # noqa: F811
    """For an area of the positive conditioning ComfyUI makes a copy of the negative one with the positive's id. Texts of other
    lengths run in forwards of their own."""
    made = Samplings()
    made.add("other", "ProbeConditioning", tokens=5, width=TEXT_WIDTH, seed=3)
    negative = made.add("other edit", "ReferenceLatent", conditioning=["other", 0], latent=["reference", 0])
    area = made.edit("area", "ConditioningSetArea", width=64, height=64, x=32, y=0, strength=1.0)
    made.add("cache", "QwenEditReferenceCache", model=FAST, tolerance=0.001)
    for name, model in (("without", FAST), ("with", ["cache", 0])):
        made.sample(name, model, positive=area, negative=negative, size=(12, 16), cfg=3.0, steps=3)
    with ArrayClient(server.url) as client:
        results = made.run(client, server)
    assert difference(results["with"], results["without"]) == 0


def test_without_our_forward_it_is_refused(server, weights):  # noqa: F811
    made = Samplings()
    made.add("cache", "QwenEditReferenceCache", model=PLAIN, tolerance=0.1)
    made.sample("refused", ["cache", 0])
    with (
        ArrayClient(server.url) as client,
        pytest.raises(ExecutionFailed, match="Put Qwen Edit Accelerate before this node"),
    ):
        client.run(made.graph)
