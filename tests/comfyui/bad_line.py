"""A line to a real server on which chosen requests go wrong, as behind a bad network or a proxy."""

import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from urllib.parse import urlsplit

CUT = -1  # instead of an HTTP status: the connection breaks off in the middle of the request


class BadLine:
    """Forwards connections, each with one request, to the server at ``url``: ``with BadLine(url, rule) as line: line.url``.

    Args:
        rule: is shown the first bytes of a request, up to its body's first kilobyte or so, and how many times it has seen
            this kind go wrong by the name that it gave; answers (name, status) for one that goes wrong, else None.
    """

    def __init__(self, url: str, rule: Callable[[str, Counter[str]], tuple[str, int] | None]):
        self._server = (urlsplit(url).hostname, urlsplit(url).port)
        self._rule = rule
        self.wrong: Counter[str] = Counter()

    def __enter__(self) -> "BadLine":
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            begun = b""
            while b"\r\n\r\n" not in begun or (begun.startswith(b"POST") and len(begun) < 1000 and not _whole(begun)):
                begun += _some(client)
            found = self._rule(begun.decode("latin-1"), self.wrong)
            if found is None:
                self._forward(client, begun)
                return
            self.wrong[found[0]] += 1
            if found[1] == CUT:  # with a reset, so that the client does not wait for an answer
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            while not _whole(begun):
                begun += _some(client)
            client.sendall(f"HTTP/1.1 {found[1]} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

    def _forward(self, client: socket.socket, begun: bytes) -> None:
        with socket.create_connection(self._server) as server:
            server.sendall(begun)
            back = threading.Thread(target=_pump, args=(server, client), daemon=True)
            back.start()
            _pump(client, server)
            back.join()


def _some(client: socket.socket) -> bytes:
    """What comes next.

    Raises:
        ConnectionResetError: nothing does; the client has left.
    """
    data = client.recv(65536)
    if not data:
        raise ConnectionResetError
    return data


def _whole(request: bytes) -> bool:
    head, _, body = request.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
    return not lengths or len(body) >= int(lengths[0])


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
