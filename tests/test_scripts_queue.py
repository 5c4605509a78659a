"""The command line's planning, workflow filling, progress bar and websocket frames."""

import base64
import hashlib
import io
import json
import socket
import struct
import threading
import time
from pathlib import Path

import comfy_socket
import edit_job
import pytest
import queue_edit
from comfy_client import Event, ImageRef, Result, node_order
from edit_job import Edit, JobError
from manifest_run import load_batch_workflow
from run_summary import BatchBar, Refused, Summary, duration

WORKFLOW = {
    "10": {"class_type": "LoadImage", "inputs": {"image": "b"}},
    "9": {"class_type": "LoadImage", "inputs": {"image": "a"}},
    "1": {"class_type": "QwenEditLoader", "inputs": {"model": "auto"}},
    "2": {"class_type": "QwenEditEncode", "inputs": {"prompt": "old"}},
    "3": {
        "class_type": "QwenEditSampler",
        "inputs": {"preset": "standard", "seed": 1},
        "_meta": {"title": "Sampler"},
    },
}


def plan(*arguments: object) -> list[Edit]:
    return queue_edit.plan(queue_edit.parse([str(argument) for argument in arguments]))


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("b.png", "a.JPG", "notes.txt"):
        (folder / name).touch()
    return folder


def test_two_images_are_one_edit(pictures):
    (edit,) = plan("--image", pictures / "b.png", "--image", pictures / "a.JPG", "--prompt", "x", "--seed", 7)
    assert edit.pictures == (pictures / "b.png", pictures / "a.JPG")
    assert (edit.seed, edit.preset, edit.output) == (7, None, Path("b_edited.png"))


def test_a_folder_is_one_edit_for_each_picture(pictures, tmp_path):
    edits = plan("--image", pictures, "--prompt", "x", "--output", tmp_path / "out")
    assert [edit.pictures[0].name for edit in edits] == ["a.JPG", "b.png"]
    assert [edit.output for edit in edits] == [
        tmp_path / "out" / "a_edited.png",
        tmp_path / "out" / "b_edited.png",
    ]


def test_prompts_are_paired_line_by_line(pictures, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffgrey\n图 invert \n\n", encoding="utf-8")
    assert [edit.prompt for edit in plan("--image", pictures, "--prompts", file)] == ["grey", "图 invert"]


def test_one_picture_with_many_prompts_has_an_output_for_each(pictures, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("grey\ninvert\nsepia\n")
    edits = plan("--image", pictures / "b.png", "--prompts", file)
    assert len({edit.output for edit in edits}) == 3


def test_different_lengths_are_an_error(pictures, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("1\n2\n3\n")
    with pytest.raises(JobError, match="2 pictures and 3 prompts"):
        plan("--image", pictures, "--prompts", file)


@pytest.mark.parametrize(("text", "message"), [("", "the file is empty"), ("a\n\nb\n", "line 2 is empty")])
def test_an_empty_prompt_line_is_an_error(pictures, tmp_path, text, message):
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    with pytest.raises(JobError, match=message):
        plan("--image", pictures, "--prompts", file)


def test_what_cannot_be_an_input_or_output_is_said(pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (["--image", tmp_path / "absent.png", "--prompt", "x"], "There is no picture"),
        (["--image", tmp_path / "empty", "--prompt", "x"], "holds no picture"),
        (["--image", pictures, "--image", pictures / "b.png", "--prompt", "x"], "must be the only"),
        (["--image", pictures / "b.png", "--prompt", "x", "--output", "o.jpg"], "should end in .png or .webp"),
        (["--image", pictures, "--prompt", "x", "--output", "o.png"], "needs a folder"),
        (["--image", pictures / "b.png", "--prompts", tmp_path / "absent.txt"], "cannot be read"),
    ]:
        with pytest.raises(JobError, match=message):
            plan(*arguments)


def test_a_workflow_is_filled_by_class_and_in_the_order_of_its_nodes():
    edit = Edit((Path("x"), Path("y")), "new", Path("o.png"), preset="draft", seed=5, model="demo")
    filled = edit_job.fill_workflow(WORKFLOW, ["first", "second"], edit)
    assert filled["9"]["inputs"]["image"] == "first"
    assert filled["10"]["inputs"]["image"] == "second"
    assert filled["2"]["inputs"]["prompt"] == "new"
    assert filled["3"]["inputs"] == {"preset": "draft", "seed": 5}
    assert filled["1"]["inputs"]["model"] == "demo"
    assert WORKFLOW["2"]["inputs"]["prompt"] == "old"


def test_what_is_not_asked_for_stays():
    filled = edit_job.fill_workflow(WORKFLOW, ["a", "b"], Edit((), "new", Path("o.png")))
    assert filled["3"]["inputs"] == {"preset": "standard", "seed": 1}


def test_a_model_of_ones_own_is_not_given_the_demo_models_size(pictures):
    def megapixels(*arguments: str) -> object:
        (edit,) = plan("--image", pictures / "b.png", "--prompt", "x", *arguments)
        filled = edit_job.fill_workflow(edit_job.load_workflow(1), ["b.png"], edit)
        return filled["3"]["inputs"]["megapixels"]

    assert megapixels() == megapixels("--model", "demo (small model of this pack)") == 0.07
    assert megapixels("--model", "folder: Qwen-Image-Edit-2511") == 1.0
    assert megapixels("--model", "folder: Qwen-Image-Edit-2511", "--megapixels", "0.5") == 0.5
    (edit,) = plan("--image", pictures / "b.png", "--prompt", "x", "--model", "m", "--workflow", "own.json")
    assert edit.megapixels is None  # a workflow of one's own says it


def test_the_example_in_the_shipped_batch_is_no_prompt_for_pictures_without_one():
    def node(named, **values) -> dict:
        workflow = load_batch_workflow(named, values, "folder: mine")
        assert workflow["1"]["inputs"]["model"] == "folder: mine"
        return workflow["2"]["inputs"]

    assert node(None, prompt=None)["prompt"] == ""
    assert node(None, prompt="mirror it", megapixels=1.0)["prompt"] == "mirror it"
    assert node(edit_job.WORKFLOWS / "batch_of_edits.json", prompt=None)["prompt"] == "make the picture black and white"


def test_a_model_that_no_node_would_take_is_refused(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"2": {"class_type": "QwenEditBatch", "inputs": {"model": ["1", 0]}}}))
    assert load_batch_workflow(path, {}, None)["2"]["inputs"] == {"model": ["1", 0]}
    with pytest.raises(JobError, match="no QwenEditLoader"):
        load_batch_workflow(path, {}, "mine")


def test_a_workflow_that_does_not_fit_is_refused():
    with pytest.raises(JobError, match="2 Load Image nodes, but there are 1"):
        edit_job.fill_workflow(WORKFLOW, ["one"], Edit((), "x", Path("o.png")))
    with pytest.raises(JobError, match="no QwenEditEncode"):
        edit_job.fill_workflow({}, [], Edit((), "x", Path("o.png")))
    with pytest.raises(JobError, match="not 3"):
        edit_job.load_workflow(3)


def test_a_workflow_of_the_browser_is_told_from_one_of_the_api(tmp_path):
    path = tmp_path / "workflow.json"
    path.write_text('{"nodes": [], "links": []}')
    with pytest.raises(JobError, match="API format"):
        edit_job.load_workflow(1, path)


def test_node_ids_are_sorted_as_numbers():
    assert sorted(["10", "9", "57:8", "57", "a"], key=node_order) == ["9", "10", "57", "57:8", "a"]
    item = {"filename": "f", "subfolder": "", "type": "output"}
    result = Result("p", {"10": {"images": [item]}, "9": {"images": [{**item, "type": "temp"}]}})
    assert result.images() == [ImageRef("10", "f", "", "output")]
    assert [image.node for image in result.images(None)] == ["9", "10"]


def test_further_pictures_of_one_edit_get_numbers():
    assert [edit_job.numbered(Path("a/o.png"), n).name for n in (1, 2)] == ["o.png", "o_2.png"]


def test_a_result_ends_as_the_servers_file_does_and_overwrites_nothing_that_was_not_named(tmp_path):
    output = tmp_path / "o.png"
    assert edit_job.ending_like(output, "x_00001_.png") == output
    assert edit_job.ending_like(output, "x_00001_.webp") == tmp_path / "o.webp"
    (tmp_path / "o.webp").write_bytes(b"the picture that is edited")
    assert edit_job.ending_like(output, "x_00001_.webp") == tmp_path / "o_2.webp"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_bar_shows_steps_on_a_terminal_and_lines_elsewhere():
    events = [
        Event("execution_cached", {"nodes": ["1"]}, 0),
        Event("executing", {"node": "3"}, 0),
        Event("progress", {"node": "3", "value": 10, "max": 40}, 0),
        Event("executing", {"node": None}, 0),
    ]
    shown = {}
    for stream in (Terminal(), io.StringIO()):
        with edit_job.ProgressBar(WORKFLOW, stream) as bar:
            for event in events:
                bar.show(event)
        shown[stream.isatty()] = stream.getvalue()
    assert "  Sampler [########......................] 10/40" in shown[True]
    assert shown[True].endswith("\r")
    assert shown[False].splitlines() == ["  1 of 5 nodes are unchanged since the last time", "  Sampler"]


def test_a_runs_bar_says_how_fast_it_goes_and_how_long_it_takes():
    bar = BatchBar()
    assert bar.line(Summary(0), 0.0) == f"[{'.' * 30}] 0/0"
    assert (
        bar.line(Summary(60, already_there=20), 5.0) == f"[{'#' * 10}{'.' * 20}] 20/60"
    )  # no pace yet, so no time left
    bad = Refused(3, "a", "")
    half = Summary(60, written=10, already_there=18, failed=[bad, bad], outages=1)
    # 10 in 20 s, so 30 in 60 s more; what was there before is no work
    assert bar.line(half, 20.0) == (
        f"[{'#' * 15}{'.' * 15}] 30/60, 30.0 a minute, 1 min 0 s left, 2 failed, server away 1 times"
    )
    assert bar.line(Summary(7, written=7), 9000.0) == f"[{'#' * 30}] 7/7, 0.0 a minute, 0 s left"
    assert duration(2 * 3600 + 600) == "2 h 10 min"


@pytest.mark.parametrize("live", [True, False])
def test_a_runs_bar_is_one_line_on_a_terminal_and_a_line_now_and_then_elsewhere(monkeypatch, live):
    stream = Terminal() if live else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    bar = BatchBar()
    for written in range(1, 5):
        bar.show(Summary(4, written=written), written == 4)
    if live:
        assert [line[:3] for line in stream.getvalue().split("\r")] == ["", "[##", "[##", "[##", "[##"]
        assert stream.getvalue().count("\n") == 1
    else:
        assert [line.partition(",")[0][-3:] for line in stream.getvalue().splitlines()] == ["1/4", "4/4"]


def frame(opcode: int, data: bytes, final: bool = True) -> bytes:
    head = bytes([(0x80 if final else 0) | opcode])
    if len(data) < 126:
        return head + bytes([len(data)]) + data
    if len(data) < 1 << 16:
        return head + struct.pack(">BH", 126, len(data)) + data
    return head + struct.pack(">BQ", 127, len(data)) + data


def serve(answer: bytes, received: list[bytes], accept: bool = True) -> str:
    """One connection of a server that shakes hands, sends `answer`, and records what comes back."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        connection, _ = listener.accept()
        request = connection.recv(65536).decode()
        key = request.partition("Sec-WebSocket-Key: ")[2].partition("\r\n")[0]
        digest = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
        status = "101 Switching Protocols" if accept else "403 Forbidden"
        head = f"HTTP/1.1 {status}\r\nSec-WebSocket-Accept: {base64.b64encode(digest).decode()}\r\n\r\n"
        connection.sendall(head.encode() + answer)
        while data := connection.recv(65536):
            received.append(data)
        connection.close()

    threading.Thread(target=run, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/ws?clientId=x"


def test_messages_of_every_length_and_in_fragments_arrive_whole():
    long = b"\xff\x00" * 50_000
    answer = (
        frame(0x1, b"short")
        + frame(0x2, long)
        + frame(0x1, "ä".encode()[:1], final=False)
        + frame(0x9, b"ping")
        + frame(0x0, "ä".encode()[1:] + b"x" * 300)
        + frame(0x8, b"")
    )
    received: list[bytes] = []
    connection = comfy_socket.WebSocket(serve(answer, received))
    assert connection.receive() == "short"
    assert connection.receive() == long
    assert connection.receive() == "ä" + "x" * 300
    assert connection.receive() is None
    connection.close()
    end = time.monotonic() + 5
    while not received and time.monotonic() < end:  # the server reads it in its own thread
        time.sleep(0.01)
    assert received[0][:2] == bytes([0x8A, 0x84]), "a masked pong of four bytes"


def test_a_refused_handshake_is_a_connection_error():
    with pytest.raises(ConnectionError, match="403"):
        comfy_socket.WebSocket(serve(b"", [], accept=False))


def test_a_connection_that_breaks_off_inside_a_message_ends():
    connection = comfy_socket.WebSocket(serve(frame(0x1, b"whole")[:-2] + b"", []))
    threading.Timer(0.2, connection.close).start()
    assert connection.receive() is None


def test_a_ping_that_can_no_longer_be_answered_ends_the_connection():
    connection = comfy_socket.WebSocket(serve(frame(0x9, b"ping"), []))
    connection._socket.shutdown(socket.SHUT_WR)
    assert connection.receive() is None
