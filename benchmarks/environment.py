"""What a measurement ran on: card, processor, versions, date. Goes into every result file."""

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "peft", "comfy-kitchen", "comfy-aimdo")
RESULTS = Path(__file__).resolve().parent / "results"


def environment() -> dict[str, Any]:
    """Card, processor, Python and package versions, and today's date (UTC)."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "card": card,
        "card_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if card else None,
        "cuda": torch.version.cuda if card else None,
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.system(),
        "versions": versions,
    }


def processor() -> str:
    """The processor's name as the system gives it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def keep(name: str, result: dict[str, Any], folder: Path | None = None) -> Path:
    """Write a result as JSON (default: benchmarks/results) and return its path."""
    path = (folder or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path
