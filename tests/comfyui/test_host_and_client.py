"""The host and the client against a real ComfyUI, with native nodes only."""

import time

import numpy as np
import pytest
from array_client import ArrayClient, from_file
from comfy_client import ComfyClient, ExecutionFailed, Interrupted, PromptRejected, ServerUnreachable
from comfy_host import PACK_NAME
from comfy_server import ComfyServer, free_port

pytestmark = pytest.mark.server


def scale_workflow(picture: str, width: int, height: int) -> dict:
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "2": {
            "class_type": "ImageScale",
            "inputs": {
                "image": ["1", 0],
                "upscale_method": "nearest-exact",
                "width": width,
                "height": height,
                "crop": "disabled",
            },
        },
        "10": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "scaled"}},
    }


def slow_workflow(picture: str, side: int = 6000) -> dict:
    """Takes seconds, in steps that can be interrupted: a row of large Lanczos resizes."""
    graph = scale_workflow(picture, side, side)
    for step in range(20):
        source = ["2", 0] if step == 0 else [f"s{step - 1}", 0]
        graph[f"s{step}"] = {
            "class_type": "ImageScale",
            "inputs": {
                "image": source,
                "upscale_method": "lanczos",
                "width": side - 8 * step,
                "height": side,
                "crop": "disabled",
            },
        }
    graph["10"]["inputs"]["images"] = ["s19", 0]
    return graph


@pytest.fixture
def checkers() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def test_the_pack_is_loaded_from_the_link(server: ComfyServer):
    lines = [line for line in server.log.read_text(errors="replace").splitlines() if PACK_NAME in line]
    assert any("seconds: " in line for line in lines), "\n".join(lines)


def test_nothing_is_written_into_the_comfyui_folder(server: ComfyServer):
    assert not (server.host.comfyui / "custom_nodes" / PACK_NAME).exists()
    assert (server.work / "custom_nodes" / PACK_NAME / "pyproject.toml").is_file()


def test_a_picture_goes_through_a_native_graph(client: ArrayClient, server: ComfyServer, checkers):
    name = client.upload_array(checkers)
    (picture,) = client.pictures(scale_workflow(name, 24, 16))
    expected = checkers.repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(np.round(picture * 255).astype(np.uint8), expected)
    assert list(server.output.glob("scaled_*.png"))


def test_a_file_with_a_foreign_name_is_uploaded(client: ArrayClient, checkers, tmp_path):
    from array_client import to_png

    path = tmp_path / 'a "quoted" näme 图.png'
    path.write_bytes(to_png(checkers))
    (picture,) = client.pictures(scale_workflow(client.upload(path), 12, 8))
    assert picture.shape == (8, 12, 3)


def test_the_events_of_a_prompt_arrive_in_order(client: ArrayClient, checkers):
    name = client.upload_array(checkers)
    result = client.run(scale_workflow(name, 31, 17))
    mine = [event for event in client.events if event.data.get("prompt_id") == result.prompt_id]
    kinds = [event.type for event in mine]
    assert kinds[0] == "execution_start"
    assert kinds.index("progress_state") < kinds.index("execution_success")
    assert kinds[-1] == "executing"
    assert mine[-1].data["node"] is None


def test_cached_nodes_are_reported_and_outputs_still_come_back(client: ArrayClient, checkers):
    workflow = scale_workflow(client.upload_array(checkers), 40, 40)
    first = client.pictures(workflow)
    second = client.run(workflow)
    cached = [e for e in client.events if e.type == "execution_cached" and e.data["nodes"]]
    assert cached[-1].data["prompt_id"] == second.prompt_id
    assert np.array_equal(client.arrays(second)[0], first[0])


def test_a_refused_workflow_names_node_and_input(client: ArrayClient, checkers):
    workflow = scale_workflow(client.upload_array(checkers), 24, 16)
    workflow["2"]["inputs"]["upscale_method"] = "magic"
    with pytest.raises(PromptRejected, match=r"node 2 \(ImageScale\).*upscale_method.*magic") as caught:
        client.run(workflow)
    assert set(caught.value.node_errors) == {"2"}


def test_an_unknown_node_is_named(client: ArrayClient):
    with pytest.raises(PromptRejected, match="NoSuchNode"):
        client.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_an_exception_in_a_node_names_the_node(client: ArrayClient, checkers, server: ComfyServer):
    name = client.upload_array(checkers)
    (server.input / name).write_bytes(b"this is not a picture")
    with pytest.raises(ExecutionFailed, match=r"Node 1 \(LoadImage\) failed") as caught:
        client.run(scale_workflow(name, 24, 16))
    assert caught.value.details["traceback"]


def test_an_unreachable_server_is_said_with_its_address():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServerUnreachable, match=url):
        ComfyClient(url)


def test_something_that_is_not_comfyui_is_said(client: ArrayClient):
    from comfy_client import ComfyError

    with pytest.raises(ComfyError, match="404"):
        client.get("/no-such-page")


def test_interrupting_stops_only_that_prompt(client: ArrayClient, checkers):
    name = client.upload_array(checkers)
    slow = client.queue(slow_workflow(name))
    waiting = client.queue(scale_workflow(name, 50, 50))
    after = client.queue(scale_workflow(name, 51, 51))
    wait_until_running(client, slow)
    client.interrupt(waiting)
    client.interrupt(slow)
    with pytest.raises(Interrupted):
        client.wait(slow, timeout_s=60)
    with pytest.raises(Interrupted):
        client.wait(waiting, timeout_s=60)
    assert client.arrays(client.wait(after, timeout_s=60))[0].shape == (51, 51, 3)


def wait_until_running(client: ComfyClient, prompt_id: str) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if any(item[1] == prompt_id for item in client.get("/queue")["queue_running"]):
            return
        time.sleep(0.02)
    raise TimeoutError


def test_a_lost_websocket_is_opened_again_and_the_result_still_comes(client: ArrayClient, checkers):
    prompt_id = client.queue(slow_workflow(client.upload_array(checkers), side=2000))
    client._socket._socket.shutdown(2)
    result = client.wait(prompt_id, timeout_s=120)
    assert result.images()
    assert any(event.type == "reconnected" for event in client.events)
    client.run(scale_workflow(client.upload_array(checkers), 9, 9))
    assert client.events[-1].type in ("executing", "status")


def test_two_clients_get_their_own_results_and_progress(client: ArrayClient, server: ComfyServer, checkers):
    with ArrayClient(server.url) as other:
        name = client.upload_array(checkers)
        mine = client.queue(scale_workflow(name, 60, 8))
        theirs = other.queue(scale_workflow(name, 70, 8))
        assert other.arrays(other.wait(theirs))[0].shape == (8, 70, 3)
        assert client.arrays(client.wait(mine))[0].shape == (8, 60, 3)
        progress = [e for e in client.events if e.type == "progress_state"]
        assert {e.data["prompt_id"] for e in progress} == {mine}


@pytest.mark.slow
def test_a_killed_server_is_noticed_and_starts_again(start_server, checkers):
    server = start_server()
    with ArrayClient(server.url) as client:
        prompt_id = client.queue(slow_workflow(client.upload_array(checkers)))
        wait_until_running(client, prompt_id)
        server.kill()
        with pytest.raises(ServerUnreachable):
            client.wait(prompt_id, timeout_s=60)
    server.start()
    with ArrayClient(server.url) as client:
        assert client.pictures(scale_workflow(client.upload_array(checkers), 12, 8))
    for path in server.output.glob("*.png"):
        assert from_file(path.read_bytes()).shape[2] == 3


@pytest.mark.slow
def test_a_server_that_cannot_start_shows_its_log(host, tmp_path):
    from comfy_host import HostError

    server = ComfyServer(host, tmp_path, ["--no-such-argument"], cpu=True)
    with pytest.raises(HostError, match="no-such-argument"):
        server.start()
    assert not server.running
