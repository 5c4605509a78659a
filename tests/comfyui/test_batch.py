"""QwenEditBatch on the real server: the same pictures as single edits, bad items, going on, and what stays outside."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
from array_client import from_file, to_png
from batches import batch_graph, put_manifest, put_pictures, report, results
from comfy_client import ExecutionFailed, Interrupted
from edits import PROMPT, changed, edited, picture, small_edit
from PIL import Image
from test_perf_report_node import log_line

pytestmark = pytest.mark.server


def test_each_item_is_the_picture_of_a_single_edit(client, server):
    """Bit for bit, whatever stands beside it: prompt, negative, seed, size and pictures of its own."""
    put_pictures(server, "same", "a.png", "b.png")
    source = put_manifest(
        server,
        "same/manifest.jsonl",
        {"picture": "a.png"},
        {"picture": "b.png", "prompt": "mirror it", "negative": "blurred", "seed": 2**64 - 1},
        {"pictures": ["a.png", "b.png"], "width": 96, "height": 64, "name": "both"},
    )
    result = client.run(batch_graph(source, "same", together=1), timeout_s=120)
    assert result.outputs["batch"]["text"][0].endswith("3 items: 3 written, 0 already there, 0 failed.")
    singles = [
        small_edit(client, picture(0)),
        changed(small_edit(client, picture(1), prompt="mirror it", seed=2**64 - 1), "encode", negative="blurred"),
        changed(small_edit(client, picture(0), picture(1)), "encode", width=96, height=64),
    ]
    files = results(server, "same")
    assert [path.name.rsplit("_", 1)[0] for path in files] == ["a", "b", "both"]
    for path, single in zip(files, singles, strict=True):
        assert np.array_equal(from_file(path.read_bytes()), edited(client, single)), path


def test_results_carry_their_parameters_and_the_workflow(client, server):
    put_pictures(server, "meta", "a.png")
    graph = batch_graph("meta", "meta")
    client.wait(client.queue(graph, {"extra_pnginfo": {"workflow": {"id": 1}}}), timeout_s=120)
    (path,) = results(server, "meta")
    texts = {name: json.loads(text) for name, text in Image.open(path).text.items()}
    for own in texts["prompt"].values():
        own.pop("is_changed", None)  # ComfyUI's
    assert texts["prompt"] == graph
    assert texts["workflow"] == {"id": 1}
    own = texts["qwen_edit"]
    assert own["pictures"] == ["a.png"]
    assert (own["prompt"], own["seed"], own["steps"], own["width"]) == (PROMPT, 3, 2, 64)
    assert own["digest"] in path.name


def test_several_in_one_forward_are_the_same_but_for_rounding(client, server):
    put_pictures(server, "together", *(f"{number}.png" for number in range(5)))
    client.run(batch_graph("together", "one by one", together=1), timeout_s=120)
    client.run(batch_graph("together", "in fours", together=4, wave=5), timeout_s=120)
    alone, beside = ([from_file(p.read_bytes()) for p in results(server, f)] for f in ("one by one", "in fours"))
    for a, b in zip(alone, beside, strict=True):
        assert np.abs(a - b).max() <= 2.01 / 255
        assert min(np.abs(a - other).max() for other in alone if other is not a) > 0.02


def test_bad_items_are_named_and_skipped(client, server):
    put_pictures(server, "bad", "good.png", "last.png")
    (server.input / "bad" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (server.input / "bad" / "cut.png").write_bytes(to_png(picture(0, 256, 256))[:3000])
    (server.input / "bad" / "notes.txt").write_text("no picture")
    bomb = to_png(picture(0))
    size = struct.pack(">II", 60_000, 60_000)
    bomb = bomb[:16] + size + bomb[24:29] + struct.pack(">I", zlib.crc32(b"IHDR" + size + bomb[24:29])) + bomb[33:]
    (server.input / "bad" / "bomb.png").write_bytes(bomb)
    source = put_manifest(
        server,
        "bad/manifest.jsonl",
        {"picture": "good.png"},
        {"picture": "missing.png"},
        {"picture": "broken.png"},
        {"picture": "notes.txt"},
        {"picture": "good.png", "width": 17},
        {"picture": "good.png", "prompt": "x" * 8001},
        {"picture": "good.png", "seed": -1},
        "{ no json",
        {"prompt": "without a picture"},
        {"picture": "good.png", "colour": "red"},
        {"picture": "cut.png"},
        {"picture": "last.png"},
        {"picture": "bomb.png"},
    )
    result = client.run(batch_graph(source, "bad"), timeout_s=120)
    failed = result.outputs["batch"]["failed"]
    lines = [entry["line"] for entry in failed]
    # PyAV reads what is there of a file that was cut off, as Load Image does
    assert {*range(2, 11), 13} <= set(lines) <= {*range(2, 12), 13}
    assert {path.name.split("_")[0] for path in results(server, "bad")} >= {"good", "last"}
    said = report(result)
    assert "line 2 (missing): [QE_INPUT] There is no 'missing.png' in ComfyUI's folder" in said
    assert "line 6, column prompt: 8,001 characters" in said
    assert "line 8: column 3: this is no valid JSON" in said
    assert str(server.work) not in json.dumps(result.outputs)


def test_a_bad_picture_of_a_folder_is_named_by_its_file(client, server):
    put_pictures(server, "bad_folder", "good.png")
    (server.input / "bad_folder" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    result = client.run(batch_graph("bad_folder", "bad_folder"), timeout_s=120)
    assert "\nbroken.png: [QE_INPUT] It can't be read" in report(result)
    assert "line" not in report(result)


def test_a_run_goes_on_where_it_was(client, server):
    names = [f"{number}.png" for number in range(4)]
    put_pictures(server, "on", *names)
    graph = batch_graph("on", "on")
    client.run(graph, timeout_s=120)
    first = results(server, "on")
    stamps = {path: path.stat().st_mtime_ns for path in first}
    first[1].unlink()
    (server.output / "on" / ".qwen_edit_123456789abc.tmp").write_bytes(b"half")
    result = client.run(graph, timeout_s=120)
    assert report(result).endswith("4 items: 1 written, 3 already there, 0 failed.")
    assert results(server, "on") == first
    assert [p for p in first if p.stat().st_mtime_ns != stamps[p]] == [first[1]]
    # another prompt, another picture and another model setting are other results
    for change in ({"prompt": "mirror it"}, {"steps": 3}):
        assert "4 written" in report(client.run(changed(graph, "batch", **change), timeout_s=120))
    assert "4 written" in report(client.run(changed(graph, "loader", attention="math"), timeout_s=120))
    (server.input / "on" / "2.png").write_bytes(to_png(picture(9)))
    assert "1 written, 3 already there" in report(client.run(graph, timeout_s=120))
    renamed = {name.replace("loader", "7"): node for name, node in graph.items()}
    renamed["batch"]["inputs"] |= {"model": ["7", 0], "clip": ["7", 1], "vae": ["7", 2]}
    assert "0 written, 4 already there" in report(client.run(renamed, timeout_s=120))


def test_an_item_that_is_there_twice_is_made_once(client, server):
    put_pictures(server, "twice", "a.png")
    (server.input / "twice" / "broken.png").write_bytes(b"\x89PNG")
    rows = [{"picture": "a.png"}] * 3 + [{"picture": "broken.png"}] * 2
    source = put_manifest(server, "twice/manifest.jsonl", *rows)
    result = client.run(batch_graph(source, "twice"), timeout_s=120)
    assert "5 items: 1 written, 2 already there, 2 failed" in report(result)
    assert len(results(server, "twice")) == 1


def test_cancelling_keeps_what_is_finished_and_the_next_run_goes_on(client, server):
    put_pictures(server, "cancel", *(f"{number}.png" for number in range(6)))
    graph = batch_graph("cancel", "cancel", steps=8, true_cfg_scale=1.0)

    def after_two(event):
        if (
            event.type == "progress"
            and event.data["node"] == "batch"
            and event.data["max"] == 48
            and event.data["value"] > 18
        ):
            client.interrupt(event.data["prompt_id"])

    with pytest.raises(Interrupted):
        client.wait(client.queue(graph), after_two, timeout_s=120)
    kept = results(server, "cancel")
    assert 2 <= len(kept) <= 4
    assert all(path.suffix == ".png" and from_file(path.read_bytes()).shape == (64, 64, 3) for path in kept)
    result = client.run(graph, timeout_s=120)
    assert f"{6 - len(kept)} written, {len(kept)} already there" in report(result)


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "/etc/passwd", "safe/link.png", "a\0.png", "folder/../../secret.png", "C:\\a.png", "x" * 5000],
)
def test_nothing_outside_the_input_folder_is_read(client, server, name):
    put_pictures(server, "safe", "a.png")
    secret = server.work / "secret.png"
    secret.write_bytes(to_png(picture(5)))
    link = server.input / "safe" / "link.png"
    if not link.is_symlink():
        link.symlink_to(secret)
    result = client.run(batch_graph(put_manifest(server, "safe.jsonl", {"picture": name}), "safe"), timeout_s=60)
    assert "is not inside ComfyUI's folder" in report(result)
    assert results(server, "safe") == []
    for source in (name, "safe/link.png"):
        with pytest.raises(ExecutionFailed, match=r"QE_INPUT|null"):
            client.run(batch_graph(source, "safe"), timeout_s=60)


@pytest.mark.parametrize("output", ["../outside", "/tmp/outside", "link", "link/deeper", "a\0b", "file"])
def test_nothing_outside_the_output_folder_is_written(client, server, output):
    put_pictures(server, "out", "a.png")
    outside = server.work / "outside"
    outside.mkdir(exist_ok=True)
    (server.output / "file").write_text("in the way")
    if not (server.output / "link").is_symlink():
        (server.output / "link").symlink_to(outside)
    with pytest.raises(ExecutionFailed, match=r"\[QE_INPUT\]|null"):
        client.run(batch_graph("out", output), timeout_s=60)
    assert os.listdir(outside) == []


def test_results_that_cannot_be_written_end_the_run(client, server):
    """Every further item would be made in vain. A folder in the way of the temporary file stops root as well."""
    put_pictures(server, "full", "a.png")
    client.run(batch_graph("full", "full"), timeout_s=60)
    (path,) = results(server, "full")
    path.unlink()
    temporary = path.with_name(f".qwen_edit_{path.stem[-12:]}.tmp")
    graph = batch_graph("full", "full")
    temporary.mkdir()
    with pytest.raises(ExecutionFailed, match="Queue the same batch again"):
        client.run(graph, timeout_s=60)
    temporary.rmdir()
    assert "1 written" in report(client.run(graph, timeout_s=60))


def test_status_says_what_was_done_and_leaks_no_path(client, server):
    put_pictures(server, "status", "a.png")
    before = client.get("/qwen_edit/status")["counters"]
    source = put_manifest(server, "status/m.jsonl", {"picture": "a.png"}, {"picture": "gone.png"})
    client.run(batch_graph(source, "status"), timeout_s=60)
    status = client.get("/qwen_edit/status")
    grown = {name: count - before[name] for name, count in status["counters"].items()}
    assert grown == {"edits": 1, "items_written": 1, "items_already_there": 0, "items_failed": 1}
    assert status["ready"] is True
    assert status["queue"] == {"running": 0, "waiting": 0}
    assert status["resident_bytes"]["models"] > 1e6
    assert "gone.png" in status["last_error"]["item"]
    (model, *_) = status["environment"]["models"]
    assert model["attention"]
    assert model["attention_why"]
    assert (model["kernels"], model["kernels_why"]) == ("pytorch", "the model runs on cpu")
    with pytest.raises(ExecutionFailed):
        client.run(batch_graph("not there", "status"), timeout_s=60)
    status = client.get("/qwen_edit/status")
    assert status["last_error"]["prompt"]["code"] == "QE_INPUT"
    assert str(server.work) not in json.dumps(status)
    client.free()
    client.get("/queue")


def test_a_transparent_picture_is_composited_over_white(client, server):
    colours = picture(0)
    alpha = np.linspace(0, 1, colours.shape[1], dtype=np.float32)[None, :, None].repeat(len(colours), 0).round(1)
    pixels = (np.concatenate([colours, alpha], -1) * 255).round().astype(np.uint8)
    folder = server.input / "transparent"
    folder.mkdir()
    Image.fromarray(pixels).save(folder / "a.png")
    client.run(batch_graph("transparent", "transparent"), timeout_s=120)
    (path,) = results(server, "transparent")
    exact = pixels.astype(np.float32) / 255
    over_white = exact[..., :3] * exact[..., 3:] + 1 - exact[..., 3:]
    single = edited(client, small_edit(client, over_white))
    assert np.abs(from_file(path.read_bytes()) - single).max() <= 3 / 255  # the single's picture was rounded to 8 bits


def test_the_log_tells_encoding_sampling_and_decoding_apart(client, server):
    put_pictures(server, "timed", "a.png", "b.png")
    graph = batch_graph("timed", "timed", together=1)
    graph["log"] = {"class_type": "QwenEditPerfLogger", "inputs": {"value": ["batch", 0], "label": "batch"}}
    prompt_id = client.queue(graph)
    client.wait(prompt_id, timeout_s=120)
    record = log_line(server, prompt_id)
    assert all(record["stages"][name]["ms"] > 0 for name in ("preprocess", "denoise", "decode"))
    (node,) = (node for node in record["nodes"] if node["class_type"] == "QwenEditBatch")
    assert node["steps"]["count"] == 2 * 2
