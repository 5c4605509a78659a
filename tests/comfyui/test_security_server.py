"""What a workflow or a request from outside can reach on a real server: which files, what network, what an answer tells."""

import json
import re
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path

import matplotlib
import pytest
from comfy_host import REPO
from edits import between, changed, edited, failure, refusal, run_fresh, small_edit
from every_node import every_node, only
from graphs import node
from safetensors.torch import save_file
from test_faults import COMBOS, PATHS, switch_inputs
from test_lora import lora_state

pytestmark = pytest.mark.server

# What ComfyUI, torch and Python themselves read while they work.
SYSTEM = ["/proc", "/sys", "/dev", "/usr", "/lib", "/etc/localtime", "/etc/mime.types", "/etc/ssl"]


@pytest.fixture
def graph(client):
    return small_edit(client)


def told(client) -> list[list[str]]:
    return client.get("/qwen_edit_probe/audit")


def opened(events: list[list[str]]) -> list[tuple[Path, bool]]:
    """Path and whether it was opened to be written, of each file that was opened by its name."""
    found = []
    for event, _, *arguments in events:
        if event == "open" and arguments[0][:1] in "'\"b":
            path = arguments[0].lstrip("b").strip("'\"")
            mode, flags = arguments[1].strip("'\""), int(arguments[2])
            found.append((Path(path), bool(re.search("[wax+]", mode)) or flags & 3 != 0))
    return found


def inside(path: Path, roots: list) -> bool:
    resolved = path.resolve()
    return any(resolved.is_relative_to(Path(root).resolve()) for root in roots)


def hostile(graph, models) -> list[dict]:
    """Edits whose values try to lead elsewhere: as widgets, and as links, which ComfyUI does not check."""
    made = []
    for pattern in PATHS[:7]:
        value = pattern.format("secret.safetensors", root=models)
        made += [changed(graph, which, **{name: value}) for which, name in COMBOS[:3]]
        text = {"text": node("ProbeText", text=value)}
        made.append(changed(graph, "loader", model=["text", 0]) | text)
        switched = between(graph, ("loader", 0), "QwenEditLoraSwitch", "model", **switch_inputs("none"))
        switched["between"]["inputs"]["lora_1"] = ["text", 0]
        made.append(switched | text)
    return made


def test_no_workflow_makes_the_pack_open_a_file_outside_comfyuis_folders(client, server, host, models, graph, good):
    """By Python's audit events: the edit, every option that touches a disk, and values that try to lead elsewhere."""
    save_file(lora_state(1), models / "secret.safetensors")
    save_file(lora_state(1), models / "loras" / "allowed.safetensors")
    edited(client, graph)
    told(client)
    logged = between(graph, ("loader", 0), "QwenEditLoraSwitch", "model", **switch_inputs("allowed.safetensors"))
    logged["log"] = node("QwenEditPerfLogger", value=["sampler", 0], label="../../../label", include_text=True)
    edited(client, logged)
    every = changed(every_node(client), "report", export="JSON and CSV")
    every = changed(every, "batch", output="audited")  # others may have made what "every node" holds
    client.run(only(every, *every), timeout_s=120)
    for bad in hostile(graph, models):
        try:
            said = refusal(client, bad)
        except AssertionError:
            said = failure(client, bad)
            assert "[QE_INPUT]" in said, said
    edited(client, changed(graph, "encode", prompt="../../etc/passwd /etc/shadow"))
    events = told(client)
    files = opened(events)
    assert any("allowed.safetensors" in str(path) for path, _ in files), "the audit sees no reading"
    assert any(path.name == "perf.jsonl" and writes for path, writes in files), "the audit sees no writing"
    logs = server.output / "qwen_edit_perf"
    assert {path.suffix for path, writes in files if writes and inside(path, [logs])} >= {".json", ".csv"}
    assert any(writes and inside(path, [server.output / "audited"]) for path, writes in files)
    assert not [path for path, _ in files if "secret" in path.name]
    fonts = matplotlib.get_cachedir()  # matplotlib's own list of them
    writable = [server.output, server.temp, server.user, server.input, "/dev/null", fonts]
    assert not [path for path, writes in files if writes and not inside(path, writable)]
    model_folders = [p for p in models.iterdir() if p.is_dir() and "secret" not in p.name]
    readable = [*writable, *model_folders, server.work, host.comfyui, REPO, sys.prefix, sys.base_prefix, *SYSTEM]
    readable.append(sysconfig.get_path("stdlib"))
    assert not [path for path, _ in files if not inside(path, readable)]


@pytest.mark.parametrize("run", ["../../x", "/../../.", "a\0b", "..", "x" * 300])
def test_a_run_whose_id_is_a_path_exports_nothing_elsewhere(client, server, good, run):
    """ComfyUI takes ids that are UUIDs; the name of the export would hold none of another's signs."""
    graph = only(changed(every_node(client), "report", export="JSON and CSV"), "report")
    before = set(server.output.rglob("*"))
    status, _ = answer(server, "/prompt", "POST", json.dumps({"prompt": graph, "prompt_id": run}).encode())
    assert status == 400
    assert set(server.output.rglob("*")) == before


def test_an_edit_uses_no_network_no_process_and_no_pickle(client, graph):
    edited(client, graph)
    told(client)
    run_fresh(client, graph)
    events = [event for event, *_ in told(client)]
    assert "open" in events
    forbidden = (
        "socket.connect",
        "socket.getaddrinfo",
        "subprocess.",
        "os.exec",
        "os.system",
        "os.posix_spawn",
        "pickle.",
        "urllib.",
    )
    assert not [event for event in events if event.startswith(forbidden)]


def test_the_performance_log_holds_no_text_unless_asked(client, server, graph):
    def logged(secret: str, include_text: bool) -> bool:
        log = node("QwenEditPerfLogger", value=["sampler", 0], label="privacy", include_text=include_text)
        path = server.output / "qwen_edit_perf" / "perf.jsonl"
        lines = path.read_text().count("\n") if path.exists() else 0
        edited(client, changed(graph, "encode", prompt=secret) | {"log": log})
        end = time.monotonic() + 20
        while not path.exists() or path.read_text().count("\n") == lines:
            assert time.monotonic() < end
            time.sleep(0.1)
        return secret in path.read_text()

    assert not logged("a secret for nobody", include_text=False)
    assert logged("a text for the log", include_text=True)


# Routes


def answer(server, path: str, method: str = "GET", body: bytes | None = None) -> tuple[int, str]:
    request = urllib.request.Request(server.url + path, data=body, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def own_routes(client) -> list[tuple[str, str]]:
    """ComfyUI offers each route a second time, under /api."""
    return [(method, path.removeprefix("/api")) for method, path in client.get("/qwen_edit_probe/routes")]


def test_all_routes_are_under_one_prefix_and_only_read(client):
    found = own_routes(client)
    assert ("GET", "/qwen_edit/doctor") in found
    assert all(path.startswith("/qwen_edit/") for _, path in found)
    assert {method for method, _ in found} <= {"GET", "HEAD"}


QUERIES = [
    "?prompt_id=../../etc/passwd", "?path=/etc/passwd", "?prompt_id=%00", "?" + "a=1&" * 500, "?prompt_id=" + "x" * 5000,
    "?prompt_id[]=1", "?%ff=%ff", "/../../../etc/passwd", "?prompt_id=<script>alert(1)</script>",
]  # fmt: skip


def test_routes_check_what_they_are_asked_and_tell_no_paths(client, server, host, models, graph, good):
    edited(client, graph)
    private = [str(p) for p in (REPO, host.comfyui, models, server.work, Path.home(), sys.prefix) if str(p) != "/"]
    for _, path in own_routes(client):
        plain = path.split("{")[0]
        for query in ("", *QUERIES):
            status, text = answer(server, plain + query)
            assert status < 500, (plain, query, text)
            assert not [p for p in private if p in text], (plain, query)
            if plain == "/qwen_edit/doctor" and query.startswith("?"):
                assert status in (400, 404), query
                assert json.loads(text)["error"].startswith("[QE_INPUT]")
        for method in ("POST", "PUT", "DELETE"):
            assert answer(server, plain, method, b"{}")[0] == 405
