"""The client's half of a WebSocket (RFC 6455), as much of it as ComfyUI's messages need.

It is here so that the command line works from any Python without installing anything. No
extensions and no subprotocols are negotiated.
"""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import ssl
import struct
from urllib.parse import urlsplit

_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


class WebSocket:
    """A connection to an http:// or https:// address: `receive` blocks for the next message.

    Raises OSError (ConnectionError for a refused handshake) when it cannot be opened.
    """

    def __init__(self, url: str, timeout_s: float = 10):
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        host = parts.hostname or "127.0.0.1"
        self._socket = socket.create_connection((host, parts.port or (443 if secure else 80)), timeout_s)
        try:
            if secure:
                self._socket = ssl.create_default_context().wrap_socket(self._socket, server_hostname=host)
            self._file = self._socket.makefile("rb")
            self._handshake(parts.netloc, f"{parts.path}?{parts.query}")
            self._socket.settimeout(None)
        except BaseException:
            self._socket.close()
            raise

    def _handshake(self, netloc: str, target: str) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            (
                f"GET {target} HTTP/1.1\r\nHost: {netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
            ).encode()
        )
        status = self._file.readline().decode("latin-1").strip()
        headers = {}
        while line := self._file.readline().decode("latin-1").strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        accepted = base64.b64encode(hashlib.sha1((key + _GUID).encode()).digest()).decode()
        if " 101" not in status or headers.get("sec-websocket-accept") != accepted:
            raise ConnectionError(f"The server refused the websocket: {status or 'no answer'}")

    def receive(self) -> str | bytes | None:
        """The next text or binary message, whole; None when the connection was closed."""
        message, kind = b"", _TEXT
        while True:
            frame = self._read_frame()
            if frame is None:
                return None
            final, opcode, data = frame
            if opcode == _CLOSE:
                return None
            if opcode == _PING:
                try:
                    self._send_frame(_PONG, data)
                except OSError:  # it was closed between the two
                    return None
                continue
            if opcode == _PONG:
                continue
            if opcode != _CONTINUATION:
                message, kind = b"", opcode
            message += data
            if final:
                return message.decode() if kind == _TEXT else message

    def _read_frame(self) -> tuple[bool, int, bytes] | None:
        try:
            first, second = self._read(2)
            length = second & 0x7F
            if length == 126:
                (length,) = struct.unpack(">H", self._read(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", self._read(8))
            return bool(first & 0x80), first & 0x0F, self._read(length)
        except (OSError, EOFError, ValueError):
            return None

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def _send_frame(self, opcode: int, data: bytes) -> None:
        # Control frames only: at most 125 bytes. A client has to mask what it sends.
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
        self._socket.sendall(bytes([0x80 | opcode, 0x80 | len(data)]) + mask + masked)

    def close(self) -> None:
        """Close the connection; a `receive` in another thread returns None."""
        try:
            self._send_frame(_CLOSE, struct.pack(">H", 1000))
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()
