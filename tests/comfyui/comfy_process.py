"""Python code run in a process of its own that has ComfyUI and the pack, for what no node shows."""

import subprocess

from comfy_host import REPO, Host

PRELUDE = """
import sys
from pathlib import Path
from comfy.cli_args import args
args.cpu = True
import importlib.util
import torch
{before}
spec = importlib.util.spec_from_file_location("pack", Path({repo!r}) / "__init__.py", submodule_search_locations=[{repo!r}])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
"""


def run_in_comfyui(host: Host, code: str, timeout_s: float = 120, before: str = "") -> str:
    """What `code` prints. The pack is the package `pack`; its modules are imported by the code itself. `before` runs before
    the pack is imported."""
    done = subprocess.run(
        [host.python, "-c", PRELUDE.format(repo=str(REPO), before=before) + code],
        cwd=host.comfyui,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def save_comfyui_vae(host: Host, folder, path) -> None:
    """The VAE of a diffusers folder as the single file that ComfyUI users have."""
    run_in_comfyui(
        host,
        f"""
from safetensors.torch import load_file, save_file
from pack.nodes.host.vae import _comfy_names
import json
folder = Path({str(folder)!r}) / "vae"
names = _comfy_names(json.loads((folder / "config.json").read_text())["base_dim"])
state = load_file(folder / "diffusion_pytorch_model.safetensors")
save_file({{names[name]: tensor for name, tensor in state.items()}}, {str(path)!r})
""",
    )
