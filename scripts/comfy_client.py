"""Talks to a running ComfyUI: upload pictures, queue a workflow, follow it, download the result.

Used by queue_edit.py, quickstart.py, the tests and the benchmarks. Only the standard library is
needed. Everything that ComfyUI reports as an error is raised as a `ComfyError` whose text can be
shown to a person.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfy_socket import WebSocket

RECONNECT_S = 10  # How long a server that was there may be away before it counts as gone.
MOST_EVENTS = 50_000  # that a client keeps: a queue that runs all night brings millions
PREVIEW_EVENT, TEXT_EVENT = 1, 3  # ComfyUI's BinaryEventTypes.PREVIEW_IMAGE and TEXT

PROXY_FINDS_NOTHING = (502, 503, 504)

# A proxy for the internet must not be asked for a server on this machine or network.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ComfyError(RuntimeError):
    """ComfyUI could not do what was asked."""


class ServerUnreachable(ComfyError):
    """Nothing answers at the server's address, or the connection broke off, or a proxy finds nothing behind it."""


class RequestRefused(ComfyError):
    """ComfyUI answered a request with an HTTP status that is an error."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class PromptRejected(ComfyError):
    """ComfyUI's validation refused the workflow. `node_errors` is its own report, by node id."""

    def __init__(self, message: str, node_errors: dict[str, Any]):
        super().__init__(message)
        self.node_errors = node_errors


class ExecutionFailed(ComfyError):
    """A node raised an exception. `details` is ComfyUI's execution_error message."""

    def __init__(self, details: dict[str, Any]):
        super().__init__(
            f"Node {details.get('node_id')} ({details.get('node_type')}) failed with "
            f"{details.get('exception_type')}: {str(details.get('exception_message')).strip()}"
        )
        self.details = details


class Interrupted(ComfyError):
    """The prompt was interrupted or taken out of the queue."""


class PromptLost(Interrupted):
    """The prompt is in neither the queue nor the history: it was deleted, or ComfyUI was restarted."""


@dataclass(frozen=True)
class Event:
    """One message from the websocket. `payload` holds a preview picture's bytes (JPEG or PNG)."""

    type: str
    data: dict[str, Any]
    time: float
    payload: bytes = b""


@dataclass(frozen=True)
class ImageRef:
    """A picture on the server, as /view names it."""

    node: str
    filename: str
    subfolder: str
    type: str


@dataclass(frozen=True)
class Result:
    """What a finished prompt left behind. `outputs` is ComfyUI's history, by node id."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]] = field(repr=False)

    def images(self, type: str | None = "output") -> list[ImageRef]:
        """The pictures of all nodes, in the order of the node ids; `type` None includes previews."""
        found = [
            ImageRef(node, item["filename"], item["subfolder"], item["type"])
            for node, output in sorted(self.outputs.items(), key=lambda pair: node_order(pair[0]))
            for item in output.get("images", [])
        ]
        return [image for image in found if type in (None, image.type)]


def node_order(node_id: str) -> list[tuple[int, str]]:
    """Sorts node ids as numbers where they are numbers ("9" before "10", "57:8" after "57")."""
    return [(int(part), "") if part.isdigit() else (1 << 62, part) for part in node_id.split(":")]


class ComfyClient:
    """One client of one ComfyUI, with a websocket of its own. Use it in a `with` statement.

    `events` lists what the websocket brought, in order, the last MOST_EVENTS of it. Preview pictures are only kept with
    `keep_previews`. Raises ServerUnreachable when nothing answers at `url`.
    """

    def __init__(self, url: str, keep_previews: bool = False):
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self.client_id = uuid.uuid4().hex
        self.events: list[Event] = []
        self._keep_previews = keep_previews
        self._first_event: dict[str, int] = {}
        self._dropped = 0
        self._changed = threading.Condition()
        self._closed = False
        self._socket = self._connect()
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> ComfyClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the websocket. Prompts that are queued stay queued."""
        self._closed = True
        self._socket.close()

    # What the server offers over HTTP

    def get(self, path: str) -> Any:
        """GET a JSON document, for example `get("/system_stats")`."""
        return json.loads(self._request(path))

    def post(self, path: str, document: Any) -> bytes:
        """POST a JSON document and return the body of the answer."""
        return self._request(path, json.dumps(document).encode(), "application/json")

    def upload(self, picture: Path | bytes, name: str | None = None, subfolder: str = "") -> str:
        """Upload a picture into ComfyUI's input folder and return the name that LoadImage takes.

        A file of this name with other contents is kept, and the upload gets another name.

        Raises FileNotFoundError when the file is not there.
        """
        data = picture if isinstance(picture, bytes) else picture.read_bytes()
        name = name or (f"{uuid.uuid4().hex}.png" if isinstance(picture, bytes) else picture.name)
        boundary = uuid.uuid4().hex
        quoted = name.replace('"', "%22")
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{quoted}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        folder = f'--{boundary}\r\nContent-Disposition: form-data; name="subfolder"\r\n\r\n{subfolder}\r\n'
        body = folder.encode() + head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
        answer = json.loads(self._request("/upload/image", body, f"multipart/form-data; boundary={boundary}"))
        return f"{answer['subfolder']}/{answer['name']}" if answer["subfolder"] else answer["name"]

    def queue(self, workflow: dict[str, Any], extra_data: dict[str, Any] | None = None) -> str:
        """Queue a workflow in API format and return its prompt id. Raises PromptRejected."""
        first_event = self._dropped + len(self.events)
        document = {"prompt": workflow, "client_id": self.client_id, "extra_data": extra_data or {}}
        prompt_id = json.loads(self.post("/prompt", document))["prompt_id"]
        self._first_event[prompt_id] = first_event
        return prompt_id

    def interrupt(self, prompt_id: str) -> None:
        """Stop this prompt, whether it runs or waits; other prompts go on."""
        self.post("/queue", {"delete": [prompt_id]})
        self.post("/interrupt", {"prompt_id": prompt_id})

    def free(self) -> None:
        """Ask ComfyUI to unload its models and forget cached results."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def download(self, image: ImageRef) -> bytes:
        """The bytes of a picture file."""
        query = {"filename": image.filename, "subfolder": image.subfolder, "type": image.type}
        return self._request("/view?" + urllib.parse.urlencode(query))

    def _request(self, path: str, body: bytes | None = None, content_type: str = "") -> bytes:
        request = urllib.request.Request(self.url + path, data=body)
        if content_type:
            request.add_header("Content-Type", content_type)
        try:
            with _OPENER.open(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code in PROXY_FINDS_NOTHING:
                raise self._unreachable(error) from None
            raise _readable(path, error.code, error.read()) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> ServerUnreachable:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return ServerUnreachable(
            f"No ComfyUI answers at {self.url} ({reason}). Is it running, and is this its address?"
        )

    # Following a prompt

    def run(
        self,
        workflow: dict[str, Any],
        on_event: Callable[[Event], None] | None = None,
        timeout_s: float | None = None,
    ) -> Result:
        """Queue a workflow and wait for it."""
        return self.wait(self.queue(workflow), on_event, timeout_s)

    def wait(
        self,
        prompt_id: str,
        on_event: Callable[[Event], None] | None = None,
        timeout_s: float | None = None,
    ) -> Result:
        """Wait until a prompt has finished, showing every event since it was queued to `on_event`.

        Raises ExecutionFailed, Interrupted, ServerUnreachable, or TimeoutError after `timeout_s`.
        A lost websocket does no harm: ComfyUI's history decides, the events only make it quick.
        """
        position = self._first_event.get(prompt_id, 0)
        begin = last_contact = time.monotonic()
        while True:
            fresh, position = self._events_after(position, patience_s=1)
            for event in fresh:
                if on_event and event.data.get("prompt_id") in (None, prompt_id):
                    on_event(event)
            if not fresh or any(_ends(event, prompt_id) for event in fresh):
                try:
                    if finished := self._finished(prompt_id):
                        return finished
                    last_contact = time.monotonic()
                except ServerUnreachable:
                    if time.monotonic() - last_contact > RECONNECT_S:
                        raise
            if timeout_s is not None and time.monotonic() - begin > timeout_s:
                raise TimeoutError(f"Prompt {prompt_id} had not finished after {timeout_s} s.")

    def _events_after(self, position: int, patience_s: float) -> tuple[list[Event], int]:
        """The events from `position` on that are kept, and the position after them."""
        with self._changed:
            self._changed.wait_for(lambda: self._dropped + len(self.events) > position, patience_s)
            return self.events[max(0, position - self._dropped) :], self._dropped + len(self.events)

    def _finished(self, prompt_id: str) -> Result | None:
        entry = self.get(f"/history/{prompt_id}").get(prompt_id)
        if entry is None:
            queue = self.get("/queue")
            if any(item[1] == prompt_id for items in queue.values() for item in items):
                return None
            # It may have finished between the two questions.
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
        if entry is None:
            raise PromptLost(f"Prompt {prompt_id} is no longer in the queue: it was deleted, or ComfyUI was restarted.")
        for kind, details in entry["status"]["messages"]:
            if kind == "execution_error":
                raise ExecutionFailed(details)
            if kind == "execution_interrupted":
                raise Interrupted(f"Interrupted in node {details['node_id']} ({details['node_type']}).")
        return Result(prompt_id, entry["outputs"])

    # The websocket

    def _connect(self) -> WebSocket:
        try:
            return WebSocket(f"{self.url}/ws?clientId={self.client_id}")
        except OSError as error:
            raise self._unreachable(error) from None

    def _listen(self) -> None:
        while not self._closed:
            message = self._socket.receive()
            if message is None:
                self._reconnect()
            elif isinstance(message, str):
                document = json.loads(message)
                self._record(Event(document["type"], document.get("data") or {}, time.time()))
            elif int.from_bytes(message[:4], "big") == TEXT_EVENT:
                # Four bytes of message type, four of the length of the node's id, the id, the text.
                end = 8 + int.from_bytes(message[4:8], "big")
                text = {"node": message[8:end].decode(), "text": message[end:].decode()}
                self._record(Event("progress_text", text, time.time()))
            elif int.from_bytes(message[:4], "big") == PREVIEW_EVENT:
                # Four bytes of message type, four of picture type, then the file.
                payload = message[8:] if self._keep_previews else b""
                self._record(Event("preview", {}, time.time(), payload))

    def _record(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            if len(self.events) > MOST_EVENTS:
                self._dropped += MOST_EVENTS // 2
                del self.events[: MOST_EVENTS // 2]
            self._changed.notify_all()

    def _reconnect(self) -> None:
        self._socket.close()
        while not self._closed:
            time.sleep(0.5)
            try:
                self._socket = self._connect()
            except ServerUnreachable:
                continue
            self._record(Event("reconnected", {}, time.time()))
            return


def _ends(event: Event, prompt_id: str) -> bool:
    # ComfyUI sends this after it has written its history; execution_success comes before.
    return event.type == "executing" and event.data.get("node") is None and event.data.get("prompt_id") == prompt_id


def _readable(path: str, status: int, body: bytes) -> ComfyError:
    try:
        document = json.loads(body)
        error = document["error"]
        assert isinstance(error, dict)
    except (ValueError, KeyError, TypeError, AssertionError):
        text = body.decode(errors="replace").strip()
        return RequestRefused(f"ComfyUI answered {path} with status {status}: {text[:500] or '(nothing)'}", status)
    lines = [f"ComfyUI refused the workflow: {_join(error)}"]
    node_errors = document.get("node_errors") or {}
    for node, report in node_errors.items():
        for problem in report["errors"]:
            lines.append(f"  node {node} ({report['class_type']}): {_join(problem)}")
    return PromptRejected("\n".join(lines), node_errors)


def _join(error: dict[str, Any]) -> str:
    parts = [str(error.get("message") or "").strip(), str(error.get("details") or "").strip()]
    return ": ".join(part for part in dict.fromkeys(parts) if part)
