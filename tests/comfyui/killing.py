"""A batch from the command line whose server is killed again and again, and what is left of it at the end."""

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from array_client import from_file, to_png
from batches import batch_graph
from comfy_host import REPO, Host
from comfy_server import ComfyServer, free_port
from edits import picture

PROMPTS = ("make it black and white", "mirror it", "invert the colours", "make it sepia")


@dataclass
class Killed:
    """What came of it. Times in seconds."""

    items: int
    server_kills: int
    client_kills: int
    written: int = 0
    lost: int = 0
    doubled: int = 0
    half_written: int = 0
    temporary_files: int = 0
    other_than_undisturbed: int = 0
    outage_seconds: float = 0.0
    seconds: float = 0.0

    def table(self) -> str:
        return "\n".join(
            [
                "| | |",
                "|---|---|",
                *(f"| {name.replace('_', ' ')} | {value:g} |" for name, value in asdict(self).items()),
            ]
        )


def make_manifest(folder: Path, items: int, side: int) -> Path:
    """Pictures with a prompt and a seed each."""
    folder.mkdir(parents=True)
    lines = ["picture,prompt,seed"]
    for number in range(items):
        (folder / f"picture{number}.png").write_bytes(to_png(picture(number, side, side)))
        lines.append(f"picture{number}.png,{PROMPTS[number % len(PROMPTS)]},{number}")
    path = folder / "manifest.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


class Client:
    """queue_edit.py as a process of its own."""

    def __init__(self, server: ComfyServer, manifest: Path, output: Path, side: int):
        workflow = manifest.with_name(f"{output.name}.json")
        workflow.write_text(json.dumps(batch_graph("", output.name, steps=4)))
        self._command = [
            sys.executable, REPO / "scripts" / "queue_edit.py", "--server", server.url, "--manifest", manifest,
            "--workflow", workflow, "--output", output,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def finish(self, timeout_s: float) -> str:
        said, _ = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, said
        return said


def run_with_kills(
    host: Host, work: Path, items: int, kills: int, client_kills: int, seed: int, side: int = 128
) -> Killed:
    """Kill the server ``kills`` times and the client ``client_kills`` times, at random moments of the run, and look.

    Raises:
        AssertionError: the run was over before it was killed as often.
    """
    chance = random.Random(seed)
    outcome = Killed(items, kills, client_kills)
    manifest = make_manifest(work / "pictures", items, side)
    server = ComfyServer(host, work / "server", cpu=True, port=free_port())
    begin = time.monotonic()
    with server:
        client = Client(server, manifest, work / "killed", side)
        for number in range(kills):
            # from reading weights to writing a result, everything happens in these seconds; on a fast machine earlier
            until, enough = time.monotonic() + chance.uniform(2, 14), items * (number + 1) // (kills + 1)
            while time.monotonic() < until and len(list((work / "killed").glob("*.png"))) < enough:
                time.sleep(0.05)
            assert client.process.poll() is None, f"The run was over before kill {number + 1}."
            server.kill()
            down = time.monotonic()
            if number < client_kills:
                client.kill()
            server.start()
            outcome.outage_seconds += time.monotonic() - down
            if number < client_kills:
                client.start()
        client.finish(timeout_s=60 + 5 * items)
        outcome.seconds = round(time.monotonic() - begin, 1)
        outcome.outage_seconds = round(outcome.outage_seconds, 1)
        undisturbed = Client(server, manifest, work / "undisturbed", side)
        undisturbed.finish(timeout_s=60 + 5 * items)
    look(outcome, server, work)
    return outcome


def look(outcome: Killed, server: ComfyServer, work: Path) -> None:
    """Count what is there, here and on the server."""
    here, there = work / "killed", server.output / "killed"
    names = {path.name for path in (work / "undisturbed").iterdir()}
    found = {path.name for path in here.iterdir()}
    log = server.log.read_text(errors="replace").partition("/undisturbed")[0]
    made = Counter(re.findall(r"Qwen Edit Fast: \d+ of \d+: wrote (\S+\.png)", log))
    # the second run writes the same names into a folder of its own, once each
    made.subtract({path.name: 1 for path in (server.output / "undisturbed").iterdir()})
    outcome.written = len(names & found)
    outcome.lost = outcome.items - outcome.written
    outcome.doubled = len(found - names) + sum(count - 1 for count in made.values() if count > 1)
    everything = [path for folder in (here, there) for path in folder.iterdir()]
    outcome.temporary_files = sum(path.suffix != ".png" or path.name.startswith(".") for path in everything)
    for path in everything:
        try:
            from_file(path.read_bytes())
        except OSError:
            outcome.half_written += 1
    for name in names & found:
        same = np.array_equal(*(from_file((folder / name).read_bytes()) for folder in (here, work / "undisturbed")))
        outcome.other_than_undisturbed += not same
