"""QwenEditStepSweep on a real server: each point is the sampler's own picture, a failed one is told, a cancel leaves nothing."""

import json
import subprocess
import sys

import numpy as np
import pytest
from array_client import ArrayClient, from_file, to_png
from comfy_client import Interrupted
from comfy_host import REPO
from edits import PROMPT, between, changed, edited, failure, fresh, note, picture, small_edit
from graphs import Graph, node

pytestmark = pytest.mark.server


def swept(graph: Graph, sweep: str = "1, 3, 2", **inputs) -> Graph:
    """The edit's graph with a sweep in the place of its sampler; "pictures" previews the batch."""
    sampler = graph["sampler"]["inputs"]
    widgets = {"sweep": sweep, "preset": "standard", "true_cfg_scale": 0.0, "shift": 0.0}
    kept = {name: sampler[name] for name in ("model", "positive", "negative", "latent", "seed")}
    without = {key: value for key, value in graph.items() if key not in ("sampler", "decode", "save")}
    return without | {
        "sweep": node("QwenEditStepSweep", **kept, vae=["loader", 2], **widgets | inputs),
        "pictures": node("PreviewImage", images=["sweep", 3]),
        "sheet": node("PreviewImage", images=["sweep", 1]),
        "table": node("PreviewAny", source=["sweep", 2]),
    }


def pictures(client: ArrayClient, result, which: str) -> list[np.ndarray]:
    return [from_file(client.download(image)) for image in result.images(None) if image.node == which]


def test_each_point_is_the_samplers_own_picture(client: ArrayClient):
    graph = small_edit(client)
    result = client.run(fresh(swept(graph, "1, 3, 2, Lightning 4")), timeout_s=180)
    made = pictures(client, result, "pictures")
    settings = [("standard", 1), ("standard", 3), ("standard", 2), ("Lightning 4", 0)]
    for one, (preset, steps) in zip(made, settings, strict=True):
        alone = edited(client, changed(graph, "sampler", preset=preset, steps=steps))
        assert np.array_equal(one, alone), (preset, steps)
    told = json.loads(result.outputs["sweep"]["sweep"][0])
    assert [point["label"] for point in told["points"]] == ["1", "3", "2", "Lightning 4"]
    assert told["reference"] == 1  # the most forwards: 3 steps with guidance
    assert told["points"][1]["ssim"] is None
    for index in (0, 2, 3):
        point = told["points"][index]
        assert 0 < point["ssim"] < 1
        error = np.mean((made[index].astype(np.float64) - made[1]) ** 2)
        assert point["psnr_db"] == pytest.approx(-10 * np.log10(error), abs=0.3)  # pictures here are rounded to 8 bit
    assert all(point["seconds"] > 0 for point in told["points"])
    (sheet,) = pictures(client, result, "sheet")
    tile = sheet[12 + 44 : 12 + 44 + 64, 12 : 12 + 64]
    assert np.array_equal(tile, made[0])
    assert "the reference" in result.outputs["table"]["text"][0]


def test_a_failed_point_is_told_and_the_others_are_compared(client: ArrayClient):
    graph = between(small_edit(client), ("loader", 0), "ProbePatch", "model", kind="nan at 3")
    result = client.run(fresh(swept(graph)), timeout_s=180)
    told = json.loads(result.outputs["sweep"]["sweep"][0])
    assert [point["error"] is None for point in told["points"]] == [True, False, True]
    assert told["points"][1]["error"].startswith("[QE_NAN]")
    assert told["reference"] == 2
    assert len(pictures(client, result, "pictures")) == 2
    assert "3 steps failed: [QE_NAN]" in note(result, "sweep")


def test_bad_sweeps_are_refused(client: ArrayClient):
    graph = swept(small_edit(client))
    assert failure(client, changed(graph, "sweep", sweep="4, many")).startswith("[QE_INPUT] The sweep holds 'many'")
    poisoned = between(graph, ("loader", 0), "ProbePatch", "model", kind="nan")
    assert "Every point of the sweep failed; the first: [QE_NAN]" in failure(client, poisoned)


def test_progress_runs_over_all_points_and_a_cancel_leaves_nothing(client: ArrayClient):
    graph = small_edit(client)
    before = edited(client, graph)
    values = []

    def note_progress(event):
        if event.type == "progress" and event.data["node"] == "sweep":
            values.append((event.data["value"], event.data["max"]))

    client.wait(client.queue(fresh(swept(graph, "2, 3"))), note_progress, timeout_s=180)
    assert values[-1] == (5, 5)
    assert values == sorted(values)
    prompt_id = client.queue(fresh(swept(graph, "80, 120")))

    def on_event(event):
        # not every value is sent
        if event.type == "progress" and event.data["node"] == "sweep" and event.data["value"] >= 2:
            client.interrupt(prompt_id)

    with pytest.raises(Interrupted):
        client.wait(prompt_id, on_event, timeout_s=60)
    assert np.array_equal(edited(client, graph), before)


@pytest.mark.slow
def test_the_benchmark_sweeps_a_picture_and_prompt_of_ones_own(server, tmp_path):
    (tmp_path / "photo.png").write_bytes(to_png(picture(4, 96, 64)))
    command = [sys.executable, REPO / "benchmarks" / "step_sweep.py", "--server", server.url, "--sweep", "1,2"]
    own = ["--image", tmp_path / "photo.png", "--prompt", PROMPT, "--results", tmp_path, "--name", "mine"]
    half = subprocess.run([*command, *own[:2]], capture_output=True, text=True, timeout=120, check=False)
    assert "--image and --prompt go together" in half.stderr
    subprocess.run([*command, *own], check=True, timeout=120)
    told = json.loads((tmp_path / "mine.json").read_text("utf-8"))
    (run,) = told["runs"]
    assert (run["photograph"], run["prompt"]) == ("photo.png", PROMPT)
    assert [point["label"] for point in told["own"]["points"]] == ["1", "2"]
    assert from_file((tmp_path / "mine.png").read_bytes()).shape[1] == 900  # the chart
