"""A record for spreadsheets and programs."""

import csv
import io
import json

from .advice import Advice

COLUMNS: tuple[str, ...] = (
    "kind",
    "id",
    "class_type",
    "stage",
    "step",
    "at_ms",
    "ms",
    "share",
    "device_ms",
    "device_mib",
    "rss_mib",
    "cached",
)


def as_json(record: dict, advice: Advice) -> str:
    """The record as `qwen_edit.perf` documents it, and the advice under `advice`."""
    return json.dumps(record | {"advice": {"code": advice.code, "sentence": advice.sentence}}, indent=1) + "\n"


def as_csv(record: dict) -> str:
    """One table of all: rows of kind run, stage, node, step (numbered from 1) and memory; times in ms, memory in MiB.

    Steps after the first come in order; a series that was cut off in the record is cut off here.
    """
    file = io.StringIO(newline="")
    rows = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\r\n")
    rows.writeheader()
    rows.writerow({"kind": "run", "id": record["prompt_id"], "ms": record["wall_ms"], "share": 1})
    for name, entry in record["stages"].items():
        rows.writerow({"kind": "stage", "stage": name, **entry})
    for node in record["nodes"] + record["spans"]:
        of_node = {key: node[key] for key in ("id", "class_type", "stage")}
        rows.writerow(
            {"kind": "node", **of_node, **{k: node[k] for k in ("at_ms", "ms", "device_ms", "cached") if k in node}}
            | {"device_mib": node.get("peak_mib", "")}
        )
        steps = node.get("steps")
        if steps:
            times = [steps["first_ms"], *steps["ms"]]
            # Device times exist for the first step too when every step was announced inside its node.
            device = [None] * (len(times) - len(steps["device_ms"])) + steps["device_ms"]
            for number, (ms, device_ms) in enumerate(zip(times, device, strict=False), 1):
                rows.writerow({"kind": "step", **of_node, "step": number, "ms": ms, "device_ms": device_ms})
    memory = record["memory"]
    device_mib = memory["device_mib"] or [None] * len(memory["at_ms"])
    for at, used, rss in zip(memory["at_ms"], device_mib, memory["rss_mib"], strict=True):
        rows.writerow({"kind": "memory", "at_ms": at, "device_mib": used, "rss_mib": rss})
    return file.getvalue()
