"""benchmarks/batch.py asks nvidia-smi for the card that the work runs on."""

import os
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.skipif(os.name == "nt", reason="the card is played by a shell script")
@pytest.mark.parametrize(
    ("visible", "asked"), [(None, "0"), ("2,3", "2"), ("GPU-8f6a, 1", "GPU-8f6a"), ("MIG-1", None)]
)
def test_how_busy_the_first_visible_card_is(tmp_path, monkeypatch, visible, asked):
    """nvidia-smi is a script that keeps what it was asked, and knows no parts of cards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))  # the benchmark adds to it
    from batch import Utilisation

    program = tmp_path / "nvidia-smi"
    program.write_text(
        f'#!/bin/sh\necho "$2" > {tmp_path}/asked\n'
        'case $2 in MIG*) echo "No devices were found";; *) for i in 1 2 3; do echo 98; done;; esac\nsleep 5\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    begin = time.monotonic()
    with Utilisation() as card:
        while time.monotonic() - begin < 5 and not (card.samples if asked else (tmp_path / "asked").exists()):
            time.sleep(0.02)
    assert (tmp_path / "asked").read_text().strip() == (asked or "MIG-1")
    assert card.mean(begin, time.monotonic()) == (98 if asked else None)
