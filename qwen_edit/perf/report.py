"""A record beside earlier ones, as people read it: which runs can be compared, and the table in words and numbers."""

from .advice import Advice
from .table import stage_table

REPORT_STAGE = "report"  # what drawing the report itself cost; comparisons leave it out
MAX_ROWS = 12


def ran(record: dict) -> list[dict]:
    """The nodes that did work, in order of their start."""
    return [node for node in record["nodes"] if not node["cached"]]


def between_nodes_ms(record: dict) -> float:
    """Wall time in which no node ran: ComfyUI itself. With the nodes' own times it adds up to the wall time."""
    return record["wall_ms"] - sum(node["ms"] for node in ran(record))


def work_ms(record: dict) -> float:
    """Wall time without the drawing of the report, at least what times are rounded to: it is divided by."""
    return max(record["wall_ms"] - record["stages"].get(REPORT_STAGE, {"ms": 0.0})["ms"], 0.1)


def previous_runs(record: dict, records: list[dict], count: int) -> list[dict]:
    """The latest finished runs of the same graph that sampled something, newest first.

    Args:
        records: of the log, oldest first; lines of older versions, which name no graph, are passed over.
    """
    same = [
        other
        for other in records
        if other["status"] == "success"
        and other.get("graph") is not None
        and other.get("graph") == record.get("graph")
        and other["prompt_id"] != record["prompt_id"]
        and "denoise" in other["stages"]
    ]
    return same[::-1][:count]


def report_table(record: dict, earlier: list[dict], advice: Advice) -> str:
    """The advice, a row for each stage, one for each node, and one for each earlier run; times in ms."""
    lines = [advice.sentence, "", stage_table(record), "", *_nodes(record)]
    if earlier:
        lines += ["", "earlier runs of this graph"]
        lines += [
            f"{other['time'][11:19]}  {work_ms(other):>10.1f}  {'cold' if other['cold'] else 'warm'}"
            for other in earlier
        ]
    return "\n".join(lines)


def _nodes(record: dict) -> list[str]:
    wall = record["wall_ms"]
    nodes = sorted(ran(record), key=lambda node: -node["ms"])
    rows = [(f"{node['class_type']} #{node['id']}", node["ms"], node["device_ms"]) for node in nodes[:MAX_ROWS]]
    rest = nodes[MAX_ROWS:]
    if rest:
        rows.append((f"{len(rest)} more nodes", sum(node["ms"] for node in rest), None))
    rows.append(("between the nodes", between_nodes_ms(record), None))
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'node':<{width}}  {'ms':>10}  {'share':>7}  {'device ms':>10}"]
    for name, ms, device in rows:
        shown = "-" if device is None else f"{device:.1f}"
        lines.append(f"{name:<{width}}  {ms:>10.1f}  {ms / wall:>7.1%}  {shown:>10}")
    lines.append(f"{'total':<{width}}  {wall:>10.1f}  {1:>7.1%}")
    cached = sum(node["cached"] for node in record["nodes"])
    if cached:
        lines.append(f"from ComfyUI's cache: {cached} {'node' if cached == 1 else 'nodes'}")
    return lines
