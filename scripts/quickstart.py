"""From a bare Python 3.11 to 3.13 to an edited photograph, with one command:

    python scripts/quickstart.py

It makes a virtual environment, fetches ComfyUI (or uses yours: --comfyui), starts it on a free local
port with this pack, queues the shipped workflow, writes the edited picture and a before/after picture,
prints where the time went, and stops ComfyUI. The second run installs nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from comfy_client import ComfyClient, ComfyError
from comfy_host import (
    REPO,
    Host,
    HostError,
    add_host_arguments,
    cache_folder,
    prepare_host,
    run_as_script,
    run_child,
    say,
)
from comfy_server import ComfyServer, has_cuda
from edit_job import Edit, JobError, load_workflow, run_edit

EXAMPLE_IMAGE = REPO / "web" / "examples" / "qwen_edit_astronaut.png"
EXAMPLE_PROMPT = "turn the picture into greyscale"
PERF_LOG = Path("qwen_edit_perf", "perf.jsonl")
PERF_PATIENCE_S = 5
PREPARED = "QWEN_EDIT_FAST_PREPARED"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=EXAMPLE_IMAGE, metavar="PATH", help="the picture to edit")
    parser.add_argument("--prompt", default=EXAMPLE_PROMPT, metavar="TEXT", help="default: %(default)s")
    parser.add_argument("--preset", metavar="NAME", help="step preset of the sampler (default: the workflow's)")
    parser.add_argument("--seed", type=int, metavar="N", help="default: the workflow's")
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart_output", "edited.png"), metavar="PATH",
        help="where the edited picture goes (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--keep-running", action="store_true", help="leave ComfyUI running until Ctrl-C")
    add_host_arguments(parser)
    return parser.parse_args()


def check_request(options: argparse.Namespace) -> None:
    """Raise JobError for what can be known before anything is installed."""
    if not options.image.is_file():
        raise JobError(f"There is no picture {options.image}.")
    if options.output.suffix.lower() != ".png":
        raise JobError(f"The result is a PNG file, so --output should end in .png; {options.output} does not.")
    load_workflow(1)


def main() -> int:
    """Prepare everything, then do the edit inside the prepared Python."""
    options = parse()
    check_request(options)
    host = prepare_host(options.comfyui, options.python)
    if os.environ.get(PREPARED) != str(host.python):
        # Pillow, which writes the before/after picture, lives in the prepared environment.
        os.environ[PREPARED] = str(host.python)
        return run_child([host.python, Path(__file__).resolve(), *sys.argv[1:]], host.comfyui)
    return edit_picture(options, host)


def edit_picture(options: argparse.Namespace, host: Host) -> int:
    """Start ComfyUI, edit, report, stop."""
    begin = time.monotonic()
    cpu = not has_cuda(host)
    say("No NVIDIA or AMD card was found: this runs on the CPU." if cpu else "This runs on the graphics card.")
    edit = Edit((options.image,), options.prompt, options.output, options.preset, options.seed)
    work = cache_folder() / "quickstart"
    with ComfyServer(host, work, cpu=cpu) as server:
        with ComfyClient(server.url) as client:
            say(f"Editing {options.image}: {options.prompt}")
            edited = run_edit(client, load_workflow(1), edit)
        picture = edited.paths[0]
        say(f"Wrote {picture}: {check_size(options.image, picture)}")
        say(f"Wrote {write_before_after(options.image, picture)}")
        say(f"\n{stage_table(server, edited.prompt_id)}\n")
        say(f"All of it took {time.monotonic() - begin:.1f} s, the start of ComfyUI included.")
        if options.keep_running:
            say(f"ComfyUI keeps running: open {server.url} in a browser. Ctrl-C stops it.")
            while server.running:
                time.sleep(1)
            raise HostError(f"ComfyUI has ended. The end of its log:\n{server.log_tail()}")
    return 0


def check_size(source: Path, edited: Path) -> str:
    """Say the size of the result, or raise ComfyError when it is not the size of the source."""
    from PIL import Image, ImageOps

    # ComfyUI turns a photograph upright, as its EXIF data says, before it edits it.
    wanted = ImageOps.exif_transpose(Image.open(source)).size
    found = Image.open(edited).size
    if found != wanted:
        raise ComfyError(f"{edited} is {found[0]} x {found[1]}, but the input is {wanted[0]} x {wanted[1]}.")
    return f"{found[0]} x {found[1]} pixels, the size of the input"


def write_before_after(source: Path, edited: Path) -> Path:
    """Put the source and the result side by side, in a file beside the result."""
    from PIL import Image, ImageOps

    left = ImageOps.exif_transpose(Image.open(source)).convert("RGB")
    right = Image.open(edited).convert("RGB")
    gap = max(4, left.width // 64)
    both = Image.new("RGB", (left.width + gap + right.width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + gap, 0))
    path = edited.with_stem(f"{edited.stem}_before_after")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder, path.name)
        both.save(unfinished)
        os.replace(unfinished, path)
    return path


def stage_table(server: ComfyServer, prompt_id: str) -> str:
    """Where the time went, as the workflow's Perf Logger recorded it."""
    sys.path.append(str(REPO))
    from qwen_edit import perf

    # The line is written just after the prompt has ended.
    end = time.monotonic() + PERF_PATIENCE_S
    while time.monotonic() < end:
        for record in reversed(perf.read_records(server.output / PERF_LOG)):
            if record["prompt_id"] == prompt_id:
                return perf.stage_table(record)
        time.sleep(0.1)
    return f"There is no stage table: {server.output / PERF_LOG} has no line for this edit."


if __name__ == "__main__":
    run_as_script(main, ComfyError, JobError)
