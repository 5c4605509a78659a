"""Says how to start ComfyUI for this pack on this machine, with a reason for each flag, or starts it:

    python scripts/launch_comfyui.py                                    print flags and environment
    python scripts/launch_comfyui.py --run -- --port 80                 start; what follows -- goes to ComfyUI
    python scripts/launch_comfyui.py --card "RTX 4070" --memory 12      plan for another machine

A pack that does not lie in ComfyUI's custom_nodes needs --comfyui PATH. The flags are checked by the parser of the ComfyUI
that they are for: one that it does not have is left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comfy_host import REPO, Host, HostError, cache_folder, find_comfyui, run_as_script, say

# GiB. The transformer in fp8, the text encoder in bf16 and the VAE together take about 30, and activations 3.
ROOM_FOR_ALL = 44
SMALL = 16
DESKTOP_SHARE = 1.0
ORDER, BY_BUS = "CUDA_DEVICE_ORDER", "PCI_BUS_ID"
VISIBLE = "CUDA_VISIBLE_DEVICES"

# Prints one JSON line: which of the options exist, which exclude each other, and what the parser says about all
# arguments together.
ASK_PARSER = """
import contextlib, io, json, sys
flags, sys.argv = sys.argv[1:], sys.argv[:1]
from comfy.cli_args import parser
known = [flag for flag in flags if flag in parser._option_string_actions]
said = io.StringIO()
try:
    with contextlib.redirect_stderr(said):
        parser.parse_args(flags)
except SystemExit:
    pass
groups = [[name for action in group._group_actions for name in action.option_strings]
          for group in parser._mutually_exclusive_groups]
print(json.dumps({"known": known, "groups": groups, "error": said.getvalue().strip().splitlines()[-1:]}))
"""


@dataclass(frozen=True)
class Card:
    """What ComfyUI will run on; `memory` in GiB, 0 without a card."""

    name: str
    memory: float


@dataclass(frozen=True)
class Choice:
    """A flag with its values, or an environment variable as NAME=VALUE, and why."""

    words: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Plan:
    """How to start ComfyUI."""

    flags: tuple[Choice, ...]
    environment: tuple[Choice, ...]
    profile: str


def find_card(python: Path, device: str) -> Card:
    """The card that nvidia-smi names, else the one that the Python's torch sees, else none.

    Args:
        device: what CUDA_VISIBLE_DEVICES would say: a number or a UUID.
    """
    environment = {ORDER: BY_BUS} | os.environ | {VISIBLE: device, "HIP_VISIBLE_DEVICES": device}
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits", f"--id={device}"]
    try:
        if environment[ORDER] != BY_BUS and device.isdigit():
            raise ValueError("nvidia-smi numbers the cards otherwise")
        name, memory = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().rsplit(",", 1)
        return Card(name.strip(), round(float(memory) / 1024, 1))
    except (OSError, subprocess.CalledProcessError, ValueError):
        pass  # another maker's card, or none
    code = (
        "import torch; p = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None\n"
        "print(p.name if p else 'none', p.total_memory if p else 0, sep='\\t')"
    )
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, env=environment)
    if found.returncode:
        return Card("none", 0)
    name, size = found.stdout.strip().split("\t")
    return Card(name, round(int(size) / 2**30, 1))


def plan(card: Card, index: int | None = 0, headless: bool = False) -> Plan:
    """A table by the card's memory, so that equal machines start equally.

    Args:
        index: of the card; None: whichever the environment lets ComfyUI see first.
    """
    flags = [
        Choice(("--preview-method", "latent2rgb"), "shows the edit while it is sampled; ComfyUI's default shows none")
    ]
    if card.memory == 0:
        flags.append(Choice(("--cpu",), "no card was found"))
        profile = "quality"
    else:
        if index is not None:
            flags.append(Choice(("--cuda-device", str(index)), "this card, and no other that is in the machine"))
        flags += [
            Choice(
                ("--use-pytorch-cross-attention",),
                "for ComfyUI's own forwards; this pack's attention is chosen on its nodes",
            ),
        ]
        profile = "auto"
        if card.memory >= ROOM_FOR_ALL:
            flags.append(Choice(("--highvram",), "transformer, text encoder and VAE fit on the card together"))
        elif card.memory < SMALL:
            profile = "small"
            if not headless:
                flags.append(
                    Choice(("--reserve-vram", f"{DESKTOP_SHARE:g}"), "GB for the desktop, which shares a small card")
                )
    if headless:
        flags += [
            Choice(("--disable-auto-launch",), "there is no screen"),
            Choice(
                ("--disable-api-nodes",),
                "the server stays local: no paid nodes, and the page asks nothing of the internet",
            ),
            Choice(
                ("--cache-lru", "64"),
                "results of the last 64 nodes stay, so that clients do not push out each other's encodings",
            ),
        ]
    environment = [
        Choice(("HF_HUB_OFFLINE=1",), "this pack reads local files only; an attempt to download fails at once"),
        Choice(("PYTHONUNBUFFERED=1",), "the log appears when it is written"),
    ]
    if card.memory:
        environment.insert(0, Choice((f"{ORDER}={BY_BUS}",), "numbers cards as nvidia-smi does"))
    return Plan(tuple(flags), tuple(environment), profile)


def with_given(ours: Sequence[Choice], given: Mapping[str, str]) -> tuple[Choice, ...]:
    """The environment variables as ComfyUI will see them: one that a person has set wins over ours."""
    chosen = []
    for choice in ours:
        name, _, value = choice.words[0].partition("=")
        if given.get(name, value) != value:
            choice = Choice((f"{name}={given[name]}",), f"as it is set already; this script would set {value}")
        chosen.append(choice)
    return tuple(chosen)


def checked(host: Host, flags: Sequence[Choice], extra: Sequence[str]) -> tuple[list[Choice], list[Choice]]:
    """The flags that this ComfyUI has, and those that it lacks.

    Raises HostError when its parser refuses the rest, or `extra`, or both together.
    """
    answer = _ask(host, [word for choice in flags for word in choice.words])
    known = set(answer["known"])
    # A flag that a person gives wins over the same flag of ours, and over one that it excludes.
    given = {word.partition("=")[0] for word in extra}
    given |= {name for group in answer["groups"] if given & set(group) for name in group}
    given.discard("--cpu")  # ours says that there is no card: the parser refuses what needs one
    kept = [choice for choice in flags if choice.words[0] in known - given]
    error = _ask(host, [word for choice in kept for word in choice.words] + list(extra))["error"]
    if error:
        raise HostError(f"ComfyUI in {host.comfyui} does not take these flags: {error[0]}")
    return kept, [choice for choice in flags if choice.words[0] not in known]


def _ask(host: Host, words: list[str]) -> dict[str, Any]:
    answer = subprocess.run(
        [host.python, "-c", ASK_PARSER, *words], cwd=host.comfyui, capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise HostError(f"ComfyUI in {host.comfyui} could not be asked for its flags:\n{answer.stderr.strip()}")
    return json.loads(answer.stdout.splitlines()[-1])


def show(card: Card, chosen: Plan, kept: list[Choice], lacking: list[Choice], command: list[str]) -> None:
    """Print the plan."""
    say(f"Card: {card.name}" + (f", {card.memory:g} GiB" if card.memory else ""))
    for choice in (*kept, *chosen.environment):
        say(f"  {' '.join(choice.words):<34} {choice.reason}")
    for choice in lacking:
        say(f"  (this ComfyUI has no {choice.words[0]})")
    say(f"Profile for Qwen Edit Loader: {chosen.profile}\n")
    say(" ".join(choice.words[0] for choice in chosen.environment) + " " + shlex.join(command))


def around(pack: Path) -> str | None:
    """The ComfyUI in whose custom_nodes the pack's folder lies."""
    return str(pack.parents[1]) if pack.parent.name == "custom_nodes" else None


def main() -> int:
    """Plan, check, print; with --run, become ComfyUI."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", metavar="NAME", help="plan for this card instead of the machine's; needs --memory")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of that card; 0: no card")
    parser.add_argument(
        "--device", type=int, metavar="N", help=f"which card (default: the first of {VISIBLE} if that is set, else 0)"
    )
    parser.add_argument("--headless", action="store_true", help="for a server without a screen")
    parser.add_argument("--run", action="store_true", help="start ComfyUI")
    parser.add_argument("extra", nargs="*", metavar="-- ARGUMENTS", help="more arguments for ComfyUI")
    parser.add_argument(
        "--comfyui", metavar="PATH",
        help="its folder (also: the environment variable COMFYUI_PATH; default: the one that has this pack)",
    )  # fmt: skip
    parser.add_argument("--python", metavar="PATH", help="ComfyUI's (default: the one that runs this script)")
    options = parser.parse_args()
    if (options.card is None) != (options.memory is None):
        parser.error("--card and --memory belong together")
    comfyui = find_comfyui(options.comfyui or os.environ.get("COMFYUI_PATH") or around(REPO), cache_folder())
    if comfyui is None:
        raise HostError("Which ComfyUI? Give its folder with --comfyui, or set COMFYUI_PATH.")
    python = options.python or sys.executable
    host = Host(Path(shutil.which(python) or python).absolute(), comfyui)  # not resolved: a venv's is a link
    if options.card:
        card, index, given = Card(options.card, options.memory), options.device or 0, {}
    else:
        given = os.environ
        # --cuda-device would overwrite the cards that somebody, or a scheduler, has left for this process.
        index = options.device if options.device is not None or VISIBLE in given else 0
        card = find_card(host.python, given[VISIBLE].split(",")[0].strip() if index is None else str(index))
    chosen = plan(card, index, options.headless)
    chosen = replace(chosen, environment=with_given(chosen.environment, given))
    kept, lacking = checked(host, chosen.flags, options.extra)
    command = [str(host.python), "main.py", *(word for choice in kept for word in choice.words), *options.extra]
    show(card, chosen, kept, lacking, command)
    if not options.run:
        return 0
    os.chdir(comfyui)
    environment = dict(choice.words[0].split("=", 1) for choice in chosen.environment) | os.environ
    if os.name == "nt":
        return subprocess.run(command, env=environment, check=False).returncode
    # ComfyUI takes this process's place, so that a container's stop reaches it.
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    run_as_script(main)
