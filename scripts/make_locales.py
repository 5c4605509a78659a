"""Writes locales/en/nodeDefs.json from what a running ComfyUI says about the nodes, and checks the others.

    python scripts/make_locales.py --server http://127.0.0.1:8188

Run it after a text of a node changed; then bring locales/zh/nodeDefs.json in step by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from comfy_client import ComfyClient, ComfyError
from comfy_host import REPO, run_as_script, say, write_atomically

LOCALES = REPO / "locales"


def english(object_info: dict[str, Any]) -> dict[str, Any]:
    """The texts of the pack's nodes as ComfyUI's page looks them up; outputs by index."""
    found = {}
    for name, node in sorted(object_info.items()):
        if not name.startswith("QwenEdit"):
            continue
        inputs = {}
        for kind in ("required", "optional"):
            for key, (typed, *options) in node["input"].get(kind, {}).items():
                inputs[key] = _entry(options[0].get("display_name") or key, options[0].get("tooltip"))
                if typed == "COMFY_AUTOGROW_V3":
                    ((_, slot),) = options[0]["template"]["input"]["required"].values()
                    # the page looks for pictures.picture_1 with _ in place of the dot
                    slots = [f"{key}_{name}" for name in options[0]["template"]["names"]]
                    inputs |= {one: _entry(one.removeprefix(f"{key}_"), slot["tooltip"]) for one in slots}
                    inputs[key] = _entry(key, slot["tooltip"])
                if options[0].get("control_after_generate"):
                    inputs["control_after_generate"] = {"name": "control after generate"}
        outputs = {
            str(index): _entry(label, tooltip)
            for index, (label, tooltip) in enumerate(zip(node["output_name"], node["output_tooltips"], strict=True))
        }
        found[name] = {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": inputs,
            "outputs": outputs,
        }
    return found


def _entry(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name} | ({"tooltip": tooltip} if tooltip else {})


def keys(texts: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """All keys of nested texts, as node.inputs.name.tooltip."""
    for key, value in texts.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def main() -> int:
    """Write the English texts and list what the other languages lack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL", help="default: %(default)s")
    options = parser.parse_args()
    with ComfyClient(options.server) as client:
        texts = english(client.get("/object_info"))
    path = LOCALES / "en" / "nodeDefs.json"
    write_atomically(path, (json.dumps(texts, indent=2, ensure_ascii=False) + "\n").encode())
    say(f"Wrote {path}")
    status = 0
    for other in sorted(set(LOCALES.glob("*/nodeDefs.json")) - {path}):
        translated = set(keys(json.loads(other.read_text(encoding="utf-8"))))
        for key in sorted(set(keys(texts)) ^ translated):
            say(f"{other}: {'no longer exists' if key in translated else 'is missing'}: {key}")
            status = 1
    return status


if __name__ == "__main__":
    run_as_script(main, ComfyError)
