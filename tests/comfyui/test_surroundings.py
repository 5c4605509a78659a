"""Other surroundings than the tested ones, in real processes: a package that is missing, ComfyUI of another version."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from array_client import ArrayClient
from comfy_host import PACK_NAME, Host
from comfy_server import ComfyServer
from edits import between, edited, failure, small_edit
from test_faults import switch_inputs

pytestmark = [pytest.mark.server, pytest.mark.slow]

HIDING = """
import sys
from importlib.machinery import PathFinder


class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "PACKAGE" else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


def with_probes(folder: Path, *custom_nodes: Path) -> list[str]:
    """Arguments for a server that also loads these folders of custom nodes, and all that is in them."""
    names = [p.name for custom in custom_nodes for p in custom.iterdir()]
    paths = {f"probe{i}": {"custom_nodes": str(custom)} for i, custom in enumerate(custom_nodes)}
    config = folder / "probes.yaml"
    config.write_text(json.dumps(paths))
    return ["--extra-model-paths-config", str(config), "--whitelist-custom-nodes", PACK_NAME, *names]


PROBE_NODES = Path(__file__).parent / "probe_nodes"


# packaging is not among them: ComfyUI's own transformers does not start without it
@pytest.mark.parametrize("package", ["diffusers", "accelerate"])
def test_without_a_package_the_nodes_are_there_and_say_what_to_install(host, tmp_path, package):
    """accelerate is needed where LoRAs are read."""

    def edit(client):
        demo = "demo: qwen_edit_demo_warm_film"
        return between(small_edit(client), ("loader", 0), "QwenEditLoraSwitch", "model", **switch_inputs(demo))

    hiding = tmp_path / "custom" / "hiding"
    hiding.mkdir(parents=True)
    (hiding / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    prestartup = hiding / "prestartup_script.py"
    prestartup.write_text(HIDING.replace("PACKAGE", package))
    server = ComfyServer(host, tmp_path / "server", with_probes(tmp_path, hiding.parent, PROBE_NODES), cpu=True)
    with server, ArrayClient(server.url) as client:
        offered = {name for name in client.get("/object_info") if name.startswith("QwenEdit")}
        assert "QwenEditLoader" in offered
        for _ in range(2):
            said = failure(client, edit(client))
            assert said.startswith(f"[QE_VERSION] The package {package} is not installed.")
            assert f"pip install -r custom_nodes/{PACK_NAME}/requirements.txt" in said or "requirements.txt" in said
    prestartup.unlink()  # installed
    with server, ArrayClient(server.url) as client:
        assert {name for name in client.get("/object_info") if name.startswith("QwenEdit")} == offered
        assert edited(client, edit(client)).shape == (64, 64, 3)


def another_comfyui(host: Host, folder: Path, version: str, old: str, new: str, within: str) -> Host:
    """A ComfyUI of this version in which a name is another throughout one of its folders; the rest is linked."""
    folder.mkdir()
    for path in host.comfyui.iterdir():
        if path.name in ("custom_nodes", "input", "output", "models", "user", "temp"):
            (folder / path.name).mkdir()
        elif path.is_dir() and path.name != within:
            (folder / path.name).symlink_to(path, target_is_directory=True)
        elif path.is_file():  # main.py finds the others beside itself, so it must not be a link
            shutil.copy(path, folder)
    shutil.copytree(
        host.comfyui / within, folder / within, ignore=shutil.ignore_patterns("__pycache__", "*.json", "*.txt")
    )
    for path in (host.comfyui / within).rglob("*"):
        copy = folder / within / path.relative_to(host.comfyui / within)
        if path.is_file() and not copy.exists() and path.suffix != ".pyc":
            copy.symlink_to(path)
    changed = 0
    for path in (folder / within).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if re.search(rf"\b{old}\b", text):
            path.write_text(re.sub(rf"\b{old}\b", new, text), encoding="utf-8")
            changed += 1
    assert changed
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return Host(host.python, folder)


def native_prompt(client) -> np.ndarray:
    name = client.upload_array(np.zeros((8, 8, 3)))
    load = {"class_type": "LoadImage", "inputs": {"image": name}}
    save = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "native"}}
    return client.pictures({"1": load, "2": save})[0]


def test_a_comfyui_without_what_the_nodes_need_gets_one_clear_message(host, tmp_path):
    """A newer one, that renamed a class which the pack imports when it is loaded."""
    newer = another_comfyui(host, tmp_path / "ComfyUI", "1.7.0", "Qwen25_7BVLI", "Qwen25_VL", "comfy")
    with ComfyServer(newer, tmp_path / "server", cpu=True) as server, ArrayClient(server.url) as client:
        log = server.log.read_text(errors="replace")
        told = [line for line in log.splitlines() if "[QE_VERSION]" in line]
        assert any("needs ComfyUI 0.30" in line and "this is ComfyUI 1.7.0" in line for line in told)
        assert not [name for name in client.get("/object_info") if name.startswith("QwenEdit")]
        assert native_prompt(client).shape == (8, 8, 3)


def test_a_comfyui_without_what_sampling_needs_says_so_on_the_node(host, tmp_path):
    """An older one, without a node that the preset ComfyUI template borrows: everything registers, the sampler tells."""
    older = another_comfyui(host, tmp_path / "ComfyUI", "0.21.3", "CFGNorm", "NormOfCFG", "comfy_extras")
    server = ComfyServer(older, tmp_path / "server", with_probes(tmp_path, PROBE_NODES), cpu=True)
    with server, ArrayClient(server.url) as client:
        said = failure(client, small_edit(client))
        assert said.startswith("[QE_VERSION] Qwen Edit Fast needs ComfyUI 0.30")
        assert "this is ComfyUI 0.21.3" in said
        assert "CFGNorm" in said
        assert native_prompt(client).shape == (8, 8, 3)
