"""One real ComfyUI for all server tests, on the CPU, with folders of its own.

`scripts/run_tests.py` prepares everything. By hand: COMFYUI_PATH=/path/to/ComfyUI pytest tests, with a
Python that has ComfyUI's requirements.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from array_client import ArrayClient
from comfy_host import PACK_NAME, Host, HostError, cache_folder, check_imports, find_comfyui
from comfy_server import ComfyServer
from edits import edited, small_edit
from graphs import Graph

StartServer = Callable[..., ComfyServer]


@pytest.fixture(scope="session")
def host() -> Host:
    """The ComfyUI that COMFYUI_PATH names, else the one that was fetched, with this Python."""
    try:
        comfyui = find_comfyui(None, cache_folder())
        if comfyui is None:
            raise HostError("No ComfyUI was found.")
        check_imports(Path(sys.executable), comfyui)
    except HostError as error:
        pytest.fail(
            f"{error}\nThe server tests need a ComfyUI: run scripts/run_tests.py, which prepares one, "
            "or set COMFYUI_PATH to a ComfyUI folder whose requirements this Python has.",
            pytrace=False,
        )
    return Host(Path(sys.executable), comfyui)


PROBE_NODES = Path(__file__).parent / "probe_nodes"
# unet_gguf: the key that ComfyUI-GGUF adds
MODEL_FOLDERS = ("diffusers", "diffusion_models", "unet_gguf", "checkpoints", "text_encoders", "vae", "loras")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders that the shared server reads, for tests to fill: `models / "loras"` and so on."""
    root = tmp_path_factory.mktemp("models")
    for folder in MODEL_FOLDERS:
        (root / folder).mkdir()
    paths = {"test": {"base_path": str(root)} | {folder: folder for folder in MODEL_FOLDERS}}
    paths["probe"] = {"custom_nodes": str(PROBE_NODES)}
    (root / "paths.yaml").write_text(json.dumps(paths), encoding="utf-8")  # JSON is YAML
    return root


@pytest.fixture(scope="session")
def server(host: Host, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The shared server: `.url`, `.input`, `.output`, `.user`, `.temp`, `.log_tail()`."""
    extra = ["--extra-model-paths-config", str(models / "paths.yaml")]
    extra += ["--whitelist-custom-nodes", PACK_NAME, "qwen_edit_probe"]
    with ComfyServer(host, tmp_path_factory.mktemp("comfyui"), extra, cpu=True, with_parent=True) as running:
        yield running


@pytest.fixture
def client(server: ComfyServer) -> Iterator[ArrayClient]:
    """A client of the shared server, with events of its own."""
    assert server.running, f"The shared server has died. The end of its log:\n{server.log_tail()}"
    with ArrayClient(server.url) as connected:
        yield connected


@pytest.fixture
def start_server(host: Host, tmp_path: Path) -> Iterator[StartServer]:
    """`start_server(*arguments)` starts one more server, with further arguments for main.py.

    It has a folder of its own, may be killed and started again, and is stopped after the test.
    """
    servers: list[ComfyServer] = []

    def start(*arguments: str) -> ComfyServer:
        server = ComfyServer(host, tmp_path / f"server{len(servers)}", arguments, cpu=True, with_parent=True)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def graph(client: ArrayClient) -> Graph:
    """A small edit in API format; files that look at others have their own."""
    return small_edit(client)


@pytest.fixture(scope="module")
def _good() -> dict[str, np.ndarray]:
    return {}


@pytest.fixture
def good(client: ArrayClient, graph: Graph, _good: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
    """The good edit; the server must still give this very picture after the test's fault."""
    if "picture" not in _good:
        _good["picture"] = edited(client, graph)
    yield _good["picture"]
    assert np.array_equal(edited(client, graph), _good["picture"])
