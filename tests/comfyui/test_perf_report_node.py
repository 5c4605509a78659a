"""QwenEditPerfReport on a real server: the picture, the numbers that add up, the export, native graphs, the route."""

import csv
import io
import json
import time
import urllib.error

import numpy as np
import pytest
from array_client import ArrayClient, from_file
from comfy_host import PACK_NAME, Host
from comfy_process import run_in_comfyui
from comfy_server import ComfyServer
from edits import changed, fresh, picture, small_edit
from graphs import Graph, node

pytestmark = pytest.mark.server


def reported(graph: Graph, source: str = "decode", **inputs) -> Graph:
    """The graph with a report on the picture of `source`; what it hands on is previewed."""
    return graph | {
        "report": node("QwenEditPerfReport", image=[source, 0], **inputs),
        "chart": node("PreviewImage", images=["report", 0]),
        "passed": node("PreviewImage", images=["report", 2]),
        "said": node("PreviewAny", source=["report", 1]),
    }


def log_line(server: ComfyServer, prompt_id: str) -> dict:
    """The log's line of a prompt, which is written a moment after its end."""
    path = server.output / "qwen_edit_perf" / "perf.jsonl"
    for _ in range(100):
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
        found = [line for line in lines if line["prompt_id"] == prompt_id]
        if found:
            return found[-1]
        time.sleep(0.05)
    raise AssertionError(f"no line for {prompt_id}")


def check_sums(record: dict) -> None:
    """Parts and the time between them are the wall time, by stage and by node."""
    assert sum(entry["ms"] for entry in record["stages"].values()) == pytest.approx(record["wall_ms"], abs=2)
    assert sum(entry["share"] for entry in record["stages"].values()) == pytest.approx(1, abs=0.005)
    nodes = sum(one["ms"] for one in record["nodes"])
    # No stage is entered outside of a node here, so what the nodes leave is the time between them.
    assert nodes + record["stages"]["host"]["ms"] == pytest.approx(record["wall_ms"], abs=2)
    ends = [one["at_ms"] + one["ms"] for one in record["nodes"] if not one["cached"]]
    starts = [one["at_ms"] for one in record["nodes"] if not one["cached"]]
    assert all(end <= start + 1 for end, start in zip(ends, starts[1:], strict=False)), "nodes overlap"
    for one in record["nodes"]:
        if "steps" in one:
            steps = one["steps"]
            assert steps["first_ms"] + sum(steps["ms"]) <= one["ms"] + 1


def test_the_report_is_a_picture_and_numbers_that_add_up(client: ArrayClient, server: ComfyServer):
    graph = reported(fresh(small_edit(client, steps=3)), export="JSON and CSV")
    result = client.run(graph, timeout_s=120)
    arrays = {}
    for image in result.images(type=None):
        arrays[image.node] = from_file(client.download(image))
    assert np.array_equal(arrays["passed"], arrays["save"])
    assert np.array_equal(arrays["chart"], arrays["report"])
    assert arrays["chart"].shape[1] == 900
    assert len(np.unique(arrays["chart"].reshape(-1, 3), axis=0)) > 50
    said = result.outputs["report"]["text"][0].split("\n")
    written = [line.removeprefix("Written: ") for line in said[1:]]
    assert [name[-4:] for name in written] == ["json", ".csv"]
    record = json.loads((server.output / written[0]).read_text("utf-8"))
    assert record["status"] == "so far"
    assert record["advice"]["sentence"] == said[0]
    check_sums(record)
    kinds = [one["class_type"] for one in record["nodes"]]
    assert {"LoadImage", "QwenEditEncode", "QwenEditSampler", "VAEDecode", "QwenEditPerfReport"} <= set(kinds)
    sampler = record["nodes"][kinds.index("QwenEditSampler")]
    assert sampler["steps"]["count"] == 3
    assert record["facts"]["steps"] == 3
    assert record["facts"]["true_cfg_scale"] == 4.0
    memory = record["memory"]
    assert len(memory["at_ms"]) == len(memory["rss_mib"]) >= 2 * len(kinds) - 1
    assert memory["at_ms"] == sorted(memory["at_ms"])
    assert memory["device_mib"] is None
    rows = list(csv.DictReader(io.StringIO((server.output / written[1]).read_text("utf-8"))))
    assert sum(float(row["ms"]) for row in rows if row["kind"] == "stage") == pytest.approx(record["wall_ms"], abs=2)
    assert [row["step"] for row in rows if row["kind"] == "step" and row["class_type"] == "QwenEditSampler"] == [
        "1",
        "2",
        "3",
    ]
    table = result.outputs["said"]["text"][0]
    assert said[0] in table
    assert "between the nodes" in table
    check_sums(log_line(server, result.prompt_id))
    # nothing of a half-written file is left
    assert [path.name for path in (server.output / "qwen_edit_perf").iterdir() if path.name.startswith(".")] == []


def test_a_second_run_is_measured_again_beside_the_first(client: ArrayClient, server: ComfyServer):
    graph = reported(fresh(small_edit(client, steps=2)))
    first = client.run(graph, timeout_s=120)
    log_line(server, first.prompt_id)
    again = client.run(changed(graph, "sampler", seed=11), timeout_s=120)
    table = again.outputs["said"]["text"][0]
    assert "earlier runs of this graph" in table
    assert "from ComfyUI's cache" in table
    idle = client.run(changed(graph, "sampler", seed=11), timeout_s=120)
    assert idle.outputs["report"]["text"][0].startswith("Nothing was sampled")


def test_a_native_graph_is_measured_without_any_other_node_of_the_pack(client: ArrayClient, server: ComfyServer):
    """Loading and scaling by ComfyUI's nodes alone; the sampler is a native one in the next test."""
    graph = {
        "load": node("LoadImage", image=client.upload_array(picture(9))),
        "scale": node(
            "ImageScale", image=["load", 0], upscale_method="lanczos", width=640, height=640, crop="disabled"
        ),
        "save": node("SaveImage", images=["scale", 0], filename_prefix="native"),
    }
    result = client.run(reported(graph, "scale"), timeout_s=60)
    record = log_line(server, result.prompt_id)
    check_sums(record)
    stages = {one["class_type"]: one["stage"] for one in record["nodes"]}
    assert stages["LoadImage"] == stages["ImageScale"] == "preprocess"
    assert stages["SaveImage"] == "save"
    assert stages["QwenEditPerfReport"] == "report"
    assert record["stages"]["save"]["ms"] > 0


def test_ksampler_and_its_steps_are_measured(client: ArrayClient, server: ComfyServer):
    graph = fresh(small_edit(client))
    graph["sampler"] = node(
        "KSampler", model=["loader", 0], positive=["encode", 0], negative=["encode", 1], latent_image=["encode", 2],
        seed=5, steps=4, cfg=2.5, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    result = client.run(reported(graph), timeout_s=120)
    record = log_line(server, result.prompt_id)
    check_sums(record)
    (sampler,) = [one for one in record["nodes"] if one["class_type"] == "KSampler"]
    assert sampler["steps"]["source"] == "progress"
    assert sampler["steps"]["count"] == 4
    assert record["facts"] == {"steps": 4, "true_cfg_scale": 2.5}


def test_comfyuis_own_encoding_is_named(client: ArrayClient, server: ComfyServer):
    graph = fresh(small_edit(client))
    for name, prompt in (("positive", "make it black and white"), ("negative", " ")):
        inputs = {"clip": ["loader", 1], "vae": ["loader", 2], "image1": ["fresh", 0]}
        graph[name] = node("TextEncodeQwenImageEditPlus", prompt=prompt, **inputs)
        graph["sampler"]["inputs"][name] = [name, 0]
    result = client.run(reported(graph), timeout_s=120)
    facts = log_line(server, result.prompt_id)["facts"]
    assert facts["native_encoding"] is True
    assert "native_forward" not in facts  # the loader's MODEL has ours


FACTS = """
import json
from pack.nodes.host.perf import _native_facts
kinds = {
    "native": ["UNETLoader", "TextEncodeQwenImageEditPlus", "KSampler"],
    "accelerated": ["UNETLoader", "QwenEditAccelerate", "TextEncodeQwenImageEditPlus", "KSampler"],
    "another model": ["UNETLoader", "CLIPTextEncode", "KSampler"],
}
graphs = {name: [{"class_type": kind, "inputs": {}} for kind in graph] for name, graph in kinds.items()}
print("RESULT", json.dumps({name: _native_facts(graph) for name, graph in graphs.items()}))
"""


def test_comfyuis_own_forward_is_known_by_its_graph(host: Host):
    assert json.loads(run_in_comfyui(host, FACTS).split("RESULT", 1)[1]) == {
        "native": {"native_encoding": True, "native_forward": True},
        "accelerated": {"native_encoding": True},
        "another model": {},
    }


def test_the_route_hands_out_runs_and_downloads_but_no_texts(client: ArrayClient, server: ComfyServer):
    secret = "a very particular instruction"
    graph = reported(fresh(small_edit(client, prompt=secret)))
    graph["log"] = node("QwenEditPerfLogger", value=["decode", 0], label="", include_text=True)
    result = client.run(graph, timeout_s=120)
    assert secret in json.dumps(log_line(server, result.prompt_id))
    runs = client.get("/qwen_edit/perf")["runs"]
    assert runs[0]["prompt_id"] == result.prompt_id
    assert runs[0]["advice"]["sentence"]
    assert secret not in json.dumps(runs)
    one = client.get(f"/qwen_edit/perf?prompt_id={result.prompt_id}&format=json")
    assert one["wall_ms"] == runs[0]["wall_ms"]
    assert "text" not in one
    for query, status in (("prompt_id=none&format=csv", 404), ("prompt_id=x", 400), ("prompt_id=x&format=exe", 400)):
        with pytest.raises(Exception, match=r"QE_INPUT|HTTP") as refused:
            client.get(f"/qwen_edit/perf?{query}")
        assert str(status) in str(refused.value) or isinstance(refused.value.__cause__, urllib.error.HTTPError)


@pytest.mark.slow
def test_without_matplotlib_the_table_still_comes(start_server, tmp_path):
    pack = tmp_path / "packs" / "no_matplotlib"
    pack.mkdir(parents=True)
    (pack / "__init__.py").write_text(
        "import sys\nsys.modules['matplotlib'] = None\nNODE_CLASS_MAPPINGS = {}\n", "utf-8"
    )
    paths = tmp_path / "paths.yaml"
    paths.write_text(json.dumps({"test": {"custom_nodes": str(pack.parent)}}), encoding="utf-8")
    extra = ["--extra-model-paths-config", str(paths), "--whitelist-custom-nodes", PACK_NAME, "no_matplotlib"]
    with ArrayClient(start_server(*extra).url) as client:
        graph = {
            "load": node("LoadImage", image=client.upload_array(picture(2))),
            "save": node("SaveImage", images=["load", 0], filename_prefix="bare"),
        }
        result = client.run(reported(graph, "load"), timeout_s=60)
        assert "pip install matplotlib" in result.outputs["report"]["text"][0]
        assert "between the nodes" in result.outputs["said"]["text"][0]
        assert len(result.images(type=None)) == 4
