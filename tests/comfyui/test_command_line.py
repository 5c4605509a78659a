"""queue_edit.py as a person runs it, against the real server and the demo model."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from array_client import ArrayClient, from_file, to_png
from comfy_host import SCRIPTS
from comfy_server import ComfyServer, free_port
from graphs import edit_graph

pytestmark = pytest.mark.server


def edit_workflow(steps: int) -> dict:
    return edit_graph(["replaced.png"], "replaced", preset="draft", seed=1, steps=steps, true_cfg_scale=1.0)


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(edit_workflow(steps=2)))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures, and between them a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, value in (("a.png", 60), ("c.png", 180)):
        (folder / name).write_bytes(to_png(np.full((64, 96, 3), value, np.uint8)))
    (folder / "b.png").write_bytes(b"not a picture")
    return folder


def command(url: str, *arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPTS / "queue_edit.py"), "--server", url, *map(str, arguments)]


def queue_edit(url: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(url, *arguments), capture_output=True, text=True, timeout=300, check=False)


def test_one_edit_writes_the_picture(server: ComfyServer, workflow, pictures, tmp_path):
    output = tmp_path / "new folder" / "edited.png"
    done = queue_edit(
        server.url, "--image", pictures / "a.png", "--prompt", "grey", "--workflow", workflow,
        "--preset", "standard", "--seed", "3", "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert from_file(output.read_bytes()).shape == (64, 96, 3)
    assert f"wrote {output}" in done.stdout
    assert "QwenEditSampler" in done.stderr
    assert [path.name for path in output.parent.iterdir()] == ["edited.png"]


def test_a_workflow_that_saves_webp_leaves_a_webp(server: ComfyServer, pictures, tmp_path):
    graph = edit_workflow(steps=2)
    graph["save"] |= {"class_type": "QwenEditSave"}
    graph["save"]["inputs"] |= {"format": "webp, lossless"}
    (tmp_path / "webp.json").write_text(json.dumps(graph))
    arguments = ["--workflow", tmp_path / "webp.json", "--output", tmp_path / "edited.png"]
    done = queue_edit(server.url, "--image", pictures / "a.png", "--prompt", "grey", *arguments)
    assert done.returncode == 0, done.stderr
    written = tmp_path / "edited.webp"
    assert f"wrote {written}" in done.stdout
    assert from_file(written.read_bytes()).shape == (64, 96, 3)
    assert not (tmp_path / "edited.png").exists()


def test_the_seed_reaches_the_sampler(server: ComfyServer, workflow, pictures, tmp_path):
    found = []
    for seed in (1, 2, 1):
        output = tmp_path / "edited.png"
        arguments = ["--workflow", workflow, "--seed", seed, "--output", output]
        queue_edit(server.url, "--image", pictures / "a.png", "--prompt", "grey", *arguments)
        found.append(from_file(output.read_bytes()))
    assert np.array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[1])


def test_one_failed_picture_does_not_stop_the_others(server: ComfyServer, workflow, pictures, tmp_path):
    output = tmp_path / "edited"
    done = queue_edit(server.url, "--image", pictures, "--prompt", "grey", "--workflow", workflow, "--output", output)
    assert done.returncode == 1
    assert sorted(path.name for path in output.iterdir()) == ["a_edited.png", "c_edited.png"]
    assert "Error: Node picture_1 (LoadImage) failed" in done.stderr
    assert "1 of 3 edits failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_value_that_comfyui_refuses_is_shown_with_what_it_takes(server: ComfyServer, workflow, pictures):
    arguments = ["--image", pictures / "a.png", "--prompt", "grey", "--workflow", workflow]
    done = queue_edit(server.url, *arguments, "--preset", "fastest")
    assert done.returncode == 1
    assert "node sampler (QwenEditSampler)" in done.stderr
    assert "'fastest' not in" in done.stderr


def test_a_server_that_is_not_there_is_said(pictures, workflow):
    url = f"http://127.0.0.1:{free_port()}"
    done = queue_edit(url, "--image", pictures / "a.png", "--prompt", "grey", "--workflow", workflow)
    assert done.returncode == 1
    assert f"Error: No ComfyUI answers at {url}" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process")
@pytest.mark.parametrize(("signal_number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_the_command_takes_its_edit_out_of_the_queue(
    client: ArrayClient, pictures, tmp_path, signal_number, status
):
    path = tmp_path / "long.json"
    path.write_text(json.dumps(edit_workflow(steps=1000)))
    output = tmp_path / "edited.png"
    arguments = ["--image", pictures / "a.png", "--prompt", "grey", "--workflow", path, "--output", output]
    process = subprocess.Popen(
        command(client.url, *arguments), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "QwenEditSampler" in line:
            break
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    end = time.monotonic() + 30
    while any(client.get("/queue").values()):
        assert time.monotonic() < end, "The edit still runs."
        time.sleep(0.1)
    assert not output.exists()


def test_a_shipped_workflow_is_the_default(server: ComfyServer, pictures, tmp_path):
    output = tmp_path / "edited.png"
    arguments = ["--image", pictures / "a.png", "--prompt", "grey", "--preset", "Lightning 4"]
    done = queue_edit(server.url, *arguments, "--output", output)
    assert done.returncode == 0, done.stderr
    assert from_file(output.read_bytes()).shape == (64, 96, 3)
