"""Several clients at once, a killed server, and an output folder that can't be written."""

import os

import numpy as np
import pytest
from array_client import ArrayClient, from_file
from comfy_client import ServerUnreachable
from edits import changed, edited, fresh, picture, run_fresh, small_edit
from graphs import edit_graph, node

pytestmark = pytest.mark.server


def test_two_clients_queue_at_once_and_get_their_own(client, server):
    with ArrayClient(server.url) as other:
        clients = [client, other]
        prompts = ["make it black and white", "mirror it"]
        graphs = [small_edit(c, picture(i), prompt=p) for i, (c, p) in enumerate(zip(clients, prompts, strict=True))]
        alone = [
            [edited(c, changed(g, "sampler", seed=seed)) for seed in range(3)]
            for c, g in zip(clients, graphs, strict=True)
        ]
        marks = [len(c.events) for c in clients]
        queued: list[list[str]] = [[], []]
        for seed in range(3):
            for index in (0, 1):
                queued[index].append(clients[index].queue(fresh(changed(graphs[index], "sampler", seed=seed))))
        for index in (0, 1):
            for seed in range(3):
                result = clients[index].wait(queued[index][seed], timeout_s=120)
                (array,) = clients[index].arrays(result)
                assert np.array_equal(array, alone[index][seed])
            progress = [e for e in clients[index].events[marks[index] :] if e.type in ("progress", "progress_state")]
            assert {e.data["prompt_id"] for e in progress} == set(queued[index])


def wait_for_step(client, prompt_id: str, step: int) -> None:
    """Until the sampler of this prompt has finished a step."""

    class Reached(Exception):
        pass

    def on_event(event):
        # while weights are read, the same node counts to 100
        mine = event.type == "progress" and event.data["node"] == "sampler" and event.data["max"] == 40
        if mine and event.data["value"] >= step:
            raise Reached

    with pytest.raises(Reached):
        client.wait(prompt_id, on_event, timeout_s=120)


def with_logger(graph):
    return {**graph, "log": node("QwenEditPerfLogger", value=["decode", 0], label="test"), "save": logged_save()}


def logged_save():
    return node("SaveImage", images=["log", 0], filename_prefix="edit")


@pytest.mark.slow
def test_a_server_killed_mid_queue_leaves_whole_files_and_starts_clean(start_server):
    server = start_server()
    with ArrayClient(server.url) as client:
        graph = with_logger(small_edit(client))
        (before,) = client.pictures(graph)
        long = changed(changed(graph, "sampler", steps=40), "encode", width=256, height=256)
        first = client.queue(long)
        second = client.queue(changed(long, "sampler", seed=99))
        wait_for_step(client, first, 2)
        server.kill()
        with pytest.raises(ServerUnreachable):
            client.wait(second, timeout_s=60)
    for path in server.output.rglob("*"):
        if path.suffix == ".png":
            assert from_file(path.read_bytes()).shape[2] == 3
        elif path.is_file():
            assert path.name == "perf.jsonl"
            lines = path.read_text().splitlines()
            assert all(line.startswith("{") and line.endswith("}") for line in lines)
    server.start()
    with ArrayClient(server.url) as client:
        assert not any(client.get("/queue").values())
        (after,) = client.pictures(with_logger(small_edit(client)))
        assert np.array_equal(after, before)


def test_a_log_folder_that_cannot_be_written_costs_one_warning(client, server):
    """A file lies where the log's folder should be, which stops root as well."""
    folder = server.output / "qwen_edit_perf"
    aside = server.output / "aside"
    if folder.exists():
        os.replace(folder, aside)
    folder.write_text("in the way")
    try:
        graph = small_edit(client)
        before = edited(client, graph)
        log_start = len(server.log.read_text(errors="replace"))
        for _ in range(2):
            assert np.array_equal(edited(client, with_logger(graph)), before)
        run_fresh(client, graph)
        said = server.log.read_text(errors="replace")[log_start:]
        assert len([line for line in said.splitlines() if "performance log" in line.lower()]) == 1, said
        assert "Traceback" not in said
    finally:
        folder.unlink()
        if aside.exists():
            os.replace(aside, folder)


def test_a_graph_without_pictures_is_refused_before_it_runs(client):
    from comfy_client import PromptRejected

    name = client.upload_array(picture())
    graph = changed(edit_graph([name], "grey"), "encode", **{"pictures.picture_1": None})
    with pytest.raises(PromptRejected, match="picture_1"):
        client.queue(graph)
