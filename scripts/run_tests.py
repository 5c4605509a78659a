"""Prepares the environment and ComfyUI, then checks and tests everything:

    python scripts/run_tests.py                    everything
    python scripts/run_tests.py --fast             only the fast tier of the tests
    python scripts/run_tests.py -- -k resize -x    what follows -- goes to pytest

The second run installs nothing. The last line is pytest's own count.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comfy_host import REPO, Host, add_host_arguments, prepare_host, run_as_script, say

# Much of the time a test waits for a server. A file stays together, as its tests share what they have prepared, and the files
# keep their order: the long ones come first.
PROCESSES = ("-n2", "--dist=loadfile", "--no-loadscope-reorder")
CLOSING_LINE = re.compile(r"\b(passed|failed|errors?|skipped|deselected|no tests ran)\b.* in [\d.]+s")


@dataclass(frozen=True)
class Step:
    """One finished check. `closing` is pytest's last line of counts, empty for the others."""

    name: str
    status: int
    seconds: float
    closing: str


def run_step(name: str, host: Host, arguments: Sequence[str | Path]) -> Step:
    """Run a module of the prepared Python, show what it prints, and keep its closing line."""
    say(f"\n== {name}")
    begin = time.monotonic()
    environment = os.environ | {"COMFYUI_PATH": str(host.comfyui), "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    # with more threads than cores, torch's wait for each other
    environment |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
    process = subprocess.Popen(
        [host.python, "-m", *arguments],
        cwd=REPO,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdout is not None
    closing = ""
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if CLOSING_LINE.search(line):
                closing = line.strip()
    except BaseException as error:
        # pytest stops its servers on an interrupt. After Ctrl-C the terminal has sent it already.
        if not isinstance(error, KeyboardInterrupt):
            process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)
        process.communicate()
        raise
    return Step(name, process.wait(), time.monotonic() - begin, closing)


def run_steps(host: Host, fast: bool, pytest_arguments: Sequence[str]) -> list[Step]:
    """All checks, pytest last; a failed one does not stop the others."""
    tier = ["-m", "not slow"] if fast else []
    return [
        run_step("ruff check", host, ["ruff", "check", "."]),
        run_step("ruff format", host, ["ruff", "format", "--check", "."]),
        run_step("pyright", host, ["pyright", "--pythonpath", host.python]),
        run_step("pytest", host, ["pytest", "tests", *PROCESSES, "--durations=10", *tier, *pytest_arguments]),
    ]


def main() -> int:
    """Prepare, run, and summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="leave out the tests that are marked slow")
    parser.add_argument("pytest_arguments", nargs="*", metavar="-- ARGUMENTS", help="more arguments for pytest")
    add_host_arguments(parser)
    options = parser.parse_args()
    host = prepare_host(options.comfyui, options.python, with_tests=True)
    say(f"Python: {host.python}\nComfyUI: {host.comfyui}")
    steps = run_steps(host, options.fast, options.pytest_arguments)
    say("\n== Summary")
    for step in steps:
        say(f"{'passed' if step.status == 0 else 'FAILED'}  {step.name:<12} {step.seconds:6.1f} s")
    say(steps[-1].closing or "pytest did not get as far as counting its tests; see its output above.")
    return 1 if any(step.status for step in steps) else 0


if __name__ == "__main__":
    run_as_script(main)
