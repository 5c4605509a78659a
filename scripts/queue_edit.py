"""Edit pictures on a running ComfyUI from the command line.

One edit with one or two pictures:
    python queue_edit.py --image room.png --prompt "paint the wall green"
    python queue_edit.py --image me.png --image coat.png --prompt "picture 1 wears the coat of picture 2"

A batch: a folder of pictures, a text file with one prompt for each, or both:
    python queue_edit.py --image photos/ --prompt "remove the background" --output edited/
    python queue_edit.py --image photos/ --prompts prompts.txt --output edited/

A manifest (.csv or .jsonl, one edit on each line) or a folder, in chunks that QwenEditBatch runs. Start it again after
anything, and it goes on where it was:
    python queue_edit.py --manifest night.csv --preset standard --output edited/
    python queue_edit.py --manifest photos/ --prompt "remove the background" --output edited/

The exit status is 0 when every edit worked, 1 when one did not, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from comfy_client import ComfyClient, ComfyError, ServerUnreachable
from comfy_host import run_as_script, say
from edit_job import Edit, JobError, add_model_arguments, load_workflow, megapixels_for, run_edit
from manifest_run import ManifestRun, asked_batch_workflow
from run_summary import BatchBar

RESULT_SUFFIXES = (".png", ".webp")  # what workflows save; the file ends as the server's does
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Batch:
    """What there is to do: for each edit its pictures and its prompt, of equal length."""

    pictures: list[tuple[Path, ...]]
    prompts: list[str]


def find_pictures(named: list[Path]) -> list[tuple[Path, ...]]:
    """The pictures of each edit: several files are one edit, a folder is one edit for each picture in it."""
    for path in named:
        if not path.exists():
            raise JobError(f"There is no picture or folder {path}.")
    folders = [path for path in named if path.is_dir()]
    if not folders:
        return [tuple(named)]
    if len(named) > 1:
        raise JobError("A folder of pictures must be the only --image: each picture in it is an edit of its own.")
    found = sorted(path for path in folders[0].iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    if not found:
        raise JobError(f"{folders[0]} holds no picture ({', '.join(sorted(PICTURE_SUFFIXES))}).")
    return [(path,) for path in found]


def read_prompts(path: Path) -> list[str]:
    """The lines of a prompt file. Blank lines may only stand at its end: others would shift the rest."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"The prompts in {path} cannot be read: {error}") from error
    if not lines or "" in lines:
        where = f"line {lines.index('') + 1}" if lines else "the file"
        raise JobError(f"{path} should have one prompt on each line, but {where} is empty.")
    return lines


def pair(pictures: list[tuple[Path, ...]], prompts: list[str]) -> Batch:
    """Pictures and prompts together. One of a kind serves for all; otherwise both must be equally many."""
    count = max(len(pictures), len(prompts))
    if len(pictures) not in (1, count) or len(prompts) not in (1, count):
        raise JobError(
            f"There are {len(pictures)} pictures and {len(prompts)} prompts. "
            "Give one prompt for all pictures, or one for each."
        )
    return Batch(pictures * (count // len(pictures)), prompts * (count // len(prompts)))


def plan_outputs(pictures: list[tuple[Path, ...]], output: Path | None, batch: bool) -> list[Path]:
    """Where the results go: the file --output for one edit, files in the folder --output for a batch."""
    stems = [group[0].stem for group in pictures]
    if not batch:
        path = output or Path(f"{stems[0]}_edited.png")
        if path.suffix.lower() not in RESULT_SUFFIXES:
            raise JobError(
                f"The result is a PNG or WebP file, so --output should end in .png or .webp; {path} does not."
            )
        return [path]
    folder = output or Path("edited")
    if folder.is_file() or folder.suffix.lower() in PICTURE_SUFFIXES:
        raise JobError(f"A batch needs a folder as its --output; {folder} is a file.")
    if len(set(stems)) < len(stems):
        stems = [f"{number:04d}_{stem}" for number, stem in enumerate(stems, start=1)]
    return [folder / f"{stem}_edited.png" for stem in stems]


def plan(options: argparse.Namespace) -> list[Edit]:
    """The edits that the command line asks for. Raises JobError before anything is uploaded."""
    pictures = find_pictures(options.image)
    prompts = read_prompts(options.prompts) if options.prompts else [options.prompt]
    is_batch = options.prompts is not None or options.image[0].is_dir()
    batch = pair(pictures, prompts)
    outputs = plan_outputs(batch.pictures, options.output, is_batch)
    return [
        Edit(group, prompt, output, options.preset, options.seed, options.model, options.megapixels)
        for group, prompt, output in zip(batch.pictures, batch.prompts, outputs, strict=True)
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL", help="default: %(default)s")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--image", type=Path, action="append", metavar="PATH",
        help="a picture; give it again for a second picture of the same edit. A folder makes a batch",
    )  # fmt: skip
    source.add_argument("--manifest", type=Path, metavar="PATH", help="a manifest or a folder of pictures, at scale")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the instruction; of a manifest, where it has none")
    prompt.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with one instruction a line")
    parser.add_argument("--preset", metavar="NAME", help="step preset of the sampler (default: the workflow's)")
    parser.add_argument("--seed", type=int, metavar="N", help="default: the workflow's")
    add_model_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="a .png file (.webp where the workflow saves that); for a batch, a folder",
    )
    parser.add_argument(
        "--patience", type=float, default=600, metavar="SECONDS",
        help="how long the server may be away while a manifest runs (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.manifest is None and options.prompt is None and options.prompts is None:
        parser.error("one of the arguments --prompt --prompts is required with --image")
    if options.manifest is not None and options.prompts is not None:
        parser.error("--prompts is for --image; write the prompts into the manifest")
    options.megapixels = megapixels_for(options)
    return options


def run_manifest(options: argparse.Namespace) -> int:
    """A manifest from start to end; the exit status."""
    workflow = asked_batch_workflow(options)
    run = ManifestRun(workflow, options.manifest, options.output or Path("edited"), options.patience)
    try:
        run.run(options.server, BatchBar().show)
    finally:
        for bad in run.summary.failed:
            print(bad.reason, file=sys.stderr)
        say(run.summary.text())
    return 1 if run.summary.failed else 0


def main() -> int:
    """Run the edits one after the other; a failed one does not stop the rest."""
    options = parse()
    if options.model is None and options.workflow is None:
        say("With the demo model, which knows a few simple edits; --model takes yours.")
    if options.manifest is not None:
        return run_manifest(options)
    edits = plan(options)
    workflow = load_workflow(len(edits[0].pictures), options.workflow)
    failed = 0
    with ComfyClient(options.server) as client:
        for number, edit in enumerate(edits, start=1):
            say(f"[{number}/{len(edits)}] {', '.join(map(str, edit.pictures))}: {edit.prompt}")
            try:
                for path in run_edit(client, workflow, edit).paths:
                    say(f"  wrote {path}")
            except ServerUnreachable:
                raise
            except (ComfyError, OSError) as error:
                failed += 1
                print(f"  Error: {error}", file=sys.stderr, flush=True)
    if failed:
        print(f"{failed} of {len(edits)} edits failed.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_as_script(main, ComfyError, JobError)
