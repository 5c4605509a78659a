"""A Chromium on a fresh ComfyUI, on the CPU, for the browser tests of each file.

The server is not the one of the server tests: its input folder must be empty and its settings are changed. The variable
QWEN_EDIT_FRONT_END names the folder of another version of ComfyUI's page, such as `comfyui_frontend_package/static` of a
wheel that was unpacked.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, BrowserError, find_programs
from comfy_host import Host, HostError, cache_folder, check_imports, find_comfyui
from comfy_server import ComfyServer


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The page of a ComfyUI that nobody has used before."""
    try:
        find_programs()
        comfyui = find_comfyui(None, cache_folder())
        if comfyui is None:
            raise HostError("The browser tests need a ComfyUI: run scripts/run_tests.py, or set COMFYUI_PATH.")
        check_imports(Path(sys.executable), comfyui)
        host = Host(Path(sys.executable), comfyui)
        page = os.environ.get("QWEN_EDIT_FRONT_END")
        extra = ["--front-end-root", page] if page else []
        with (
            ComfyServer(host, tmp_path_factory.mktemp("comfyui_browser"), extra, cpu=True, with_parent=True) as server,
            Browser(server.url) as opened,
        ):
            opened.set("Comfy.Execution.PreviewMethod", "latent2rgb")
            opened.open()
            yield opened
    except (BrowserError, HostError) as error:
        pytest.fail(str(error), pytrace=False)
