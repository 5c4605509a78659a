"""Runs one ComfyUI with the pack, on a free loopback port, with folders of its own.

Nothing is written into the ComfyUI folder: the pack is linked into the work folder, which an
extra model paths file names, and input, output, temp and user folders lie beside it. Of the
custom nodes only this pack is loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from comfy_host import PACK_NAME, REPO, SCRIPTS, Host, HostError, link_pack, say

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 15

# A proxy for the internet must not be asked for a server on this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def has_cuda(host: Host) -> bool:
    """Whether torch sees an NVIDIA or AMD card. Without a driver torch is not even asked."""
    if not (shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()):
        return False
    code = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([host.python, "-c", code], capture_output=True, check=False).returncode == 0


def free_port() -> int:
    """A loopback port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ComfyServer:
    """A ComfyUI process: `with ComfyServer(host, work) as server: ... server.url`.

    `work` is a folder that the server may fill; it stays when the server stops. `extra` are more
    arguments for ComfyUI's main.py. The server can be stopped, killed and started again; every start
    takes a new port, or `port` if it is named. `with_parent` ends it when this process is gone, however that went. Raises
    HostError with the end of the log when ComfyUI does not come up.
    """

    def __init__(
        self,
        host: Host,
        work: Path,
        extra: Sequence[str] = (),
        cpu: bool = False,
        report: Callable[[str], None] = say,
        port: int | None = None,
        with_parent: bool = False,
    ):
        self.host = host
        self.work = work.resolve()
        self.input = self.work / "input"
        self.output = self.work / "output"
        self.user = self.work / "user"
        self.temp = self.work / "temp"
        self.log = self.work / "comfyui.log"
        self.url = ""
        self._extra = [*(["--cpu"] if cpu else []), *extra]
        self._report = report
        self._port = port
        self._with_parent = with_parent
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._process is None:
            raise RuntimeError("The server is not running.")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start ComfyUI and return when it answers."""
        for folder in (self.input, self.output, self.user, self.temp):
            folder.mkdir(parents=True, exist_ok=True)
        port = self._port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._report(f"Starting ComfyUI on {self.url} (log: {self.log})")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        # The pack works without a network; this makes an attempt to use one fail at once.
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(port),
                cwd=self.host.comfyui,
                env=environment,
                stdin=subprocess.PIPE if self._with_parent else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own, so that all of it can be stopped and Ctrl-C reaches only us.
                start_new_session=os.name != "nt",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _command(self, port: int) -> list[str | Path]:
        return [
            self.host.python, *([SCRIPTS / "with_parent.py"] if self._with_parent else []), "main.py", "--listen", "127.0.0.1", "--port", str(port),
            "--input-directory", self.input, "--output-directory", self.output,
            "--user-directory", self.user, "--temp-directory", self.temp,
            "--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes",
            "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK_NAME,
            *self._pack_arguments(), *self._extra,
        ]  # fmt: skip

    def _pack_arguments(self) -> list[str | Path]:
        if (self.host.comfyui / "custom_nodes" / PACK_NAME).resolve() == REPO:
            return []
        link = link_pack(self.work / "custom_nodes")
        config = self.work / "extra_model_paths.yaml"
        # JSON is YAML, and needs no YAML library to write.
        config.write_text(json.dumps({"qwen_edit_fast": {"custom_nodes": str(link.parent)}}), encoding="utf-8")
        return ["--extra-model-paths-config", config]

    def _wait_until_ready(self) -> None:
        begin = time.monotonic()
        next_report = 10
        while not self._answers():
            waited = time.monotonic() - begin
            if not self.running:
                raise HostError(f"ComfyUI ended while it was starting. The end of its log:\n{self.log_tail()}")
            if waited > START_TIMEOUT_S:
                raise HostError(
                    f"ComfyUI did not answer in {START_TIMEOUT_S} s. The end of its log:\n{self.log_tail()}"
                )
            if waited > next_report:
                self._report(f"  still starting after {waited:.0f} s")
                next_report += 10
            time.sleep(0.2)
        self._report(f"ComfyUI answers after {time.monotonic() - begin:.1f} s")

    def _answers(self) -> bool:
        try:
            with _OPENER.open(f"{self.url}/system_stats", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def log_tail(self, lines: int = 30) -> str:
        """The last lines that ComfyUI wrote."""
        if not self.log.is_file():
            return "(no log)"
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """Ask the server to end, and kill it and its children when it does not."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            _signal_group(process, hard=False)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _signal_group(process, hard=True)
                process.wait()
        self._report("ComfyUI has stopped")

    def kill(self) -> None:
        """End the server at once, as a power cut would."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            _signal_group(process, hard=True)
            process.wait()


def _signal_group(process: subprocess.Popen[bytes], hard: bool) -> None:
    """Signal a process and its children. Windows has no gentle signal that ComfyUI answers to."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)
    else:
        os.killpg(process.pid, signal.SIGKILL if hard else signal.SIGTERM)
