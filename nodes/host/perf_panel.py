"""What the panel in the browser lives on: a message while a run goes on and after it, and ``GET /qwen_edit/perf``.

Without arguments the route answers with the latest runs of the log, newest first; with ``prompt_id`` and ``format`` (json or
csv) with one run as a download. Texts of prompts, which the log holds when a logger was asked to keep them, never leave here.
"""

import asyncio
from pathlib import Path

import folder_paths
from aiohttp import web
from server import PromptServer

from ...qwen_edit import perf
from ...qwen_edit.errors import INPUT

NAME = "qwen_edit_perf"  # of the message, the log's folder and the progress handler
ROUTE = "/qwen_edit/perf"
FORMAT = 2  # of records; lines of older versions lack what the panel shows
KEPT_RUNS = 10
MAX_ID = 128  # characters of a prompt id in a request


def log_path() -> Path:
    """The log in ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory()) / NAME / "perf.jsonl"


def send(record: dict, advice: perf.Advice | None, client_id: str | None) -> None:
    """Show a run in the panel of one client, or of all (None)."""
    PromptServer.instance.send_sync(NAME, _shown(record, advice), client_id)


def register() -> None:
    """Add the route to ComfyUI's server; called once, when ComfyUI loads the pack."""
    PromptServer.instance.routes.get(ROUTE)(_answer)


def _shown(record: dict, advice: perf.Advice | None) -> dict:
    shown = {key: value for key, value in record.items() if key != "text"}
    if advice is not None:
        shown["advice"] = {"code": advice.code, "values": advice.values, "sentence": advice.sentence}
    return shown


def _advice(record: dict, records: list[dict]) -> perf.Advice:
    before = perf.previous_runs(record, records[: records.index(record)], 1)
    return perf.advise(record, before[0] if before else None)


async def _answer(request: web.Request) -> web.Response:
    records = await asyncio.to_thread(perf.read_records, log_path())
    records = [record for record in records if record["format"] == FORMAT]
    if not request.query:
        latest = records[: -KEPT_RUNS - 1 : -1]
        return web.json_response({"runs": [_shown(record, _advice(record, records)) for record in latest]})
    prompt, form = request.query.get("prompt_id", ""), request.query.get("format")
    if set(request.query) != {"prompt_id", "format"} or form not in ("json", "csv") or not 0 < len(prompt) <= MAX_ID:
        return web.json_response(
            {
                "error": f"{INPUT} This takes prompt_id (up to {MAX_ID} characters) and format (json or csv), or nothing."
            },
            status=400,
        )
    record = next((record for record in reversed(records) if record["prompt_id"] == prompt), None)
    if record is None:
        return web.json_response({"error": f"{INPUT} The log has no run of that prompt."}, status=404)
    without_text = {key: value for key, value in record.items() if key != "text"}
    text = perf.as_csv(without_text) if form == "csv" else perf.as_json(without_text, _advice(record, records))
    return web.Response(
        text=text,
        content_type="text/csv" if form == "csv" else "application/json",
        headers={"Content-Disposition": f'attachment; filename="{NAME}.{form}"'},
    )
