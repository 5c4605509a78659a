"""ray_edit.py on a local cluster of two workers on the CPU, one of them killed in mid-run: everything is done once."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from array_client import from_file, to_png
from batches import batch_graph
from comfy_host import REPO
from comfy_server import free_port
from edit_job import JobError
from edit_worker import Delivered
from edits import picture
from killing import make_manifest
from manifest_run import ManifestRun

ray = pytest.importorskip("ray")
ray_edit = pytest.importorskip("ray_edit")
pytestmark = [pytest.mark.server, pytest.mark.slow]
ITEMS = 40


def wrote(work) -> list[str]:
    """The results that the workers' ComfyUIs have announced."""
    logs = [log.read_text(errors="replace") for log in work.glob("worker*/server/comfyui.log")]
    return [name for log in logs for name in re.findall(r"Qwen Edit Fast: \d+ of \d+: wrote (\S+\.png)", log)]


def test_two_workers_one_killed(host, tmp_path):
    manifest = make_manifest(tmp_path / "pictures", ITEMS, side=64)
    workflow = tmp_path / "workflow.json"
    workflow.write_text(json.dumps(batch_graph("", "ray", steps=2)))
    work, output = tmp_path / "work", tmp_path / "edited"
    command = [
        sys.executable, REPO / "scripts" / "ray_edit.py", "--cpus", "2", "--manifest", manifest, "--output", output,
        "--workflow", workflow, "--work", work, "--comfyui", host.comfyui,
    ]  # fmt: skip
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        begin = time.monotonic()
        while len(wrote(work)) < 10:
            assert driver.poll() is None, driver.stdout.read()
            assert time.monotonic() - begin < 240
            time.sleep(0.2)
        actors = [
            child for child in psutil.Process(driver.pid).children(recursive=True) if "EditWorker" in name_of(child)
        ]
        servers = [child for actor in actors for child in actor.children()]
        assert len(actors) == len(servers) == 2
        os.kill(actors[0].pid, signal.SIGKILL)
        psutil.wait_procs(servers[:1], timeout=10)
        assert not servers[0].is_running() or servers[0].status() == psutil.STATUS_ZOMBIE
        said, _ = driver.communicate(timeout=240)
    finally:
        driver.kill()
    assert driver.returncode == 0, said
    assert f"{ITEMS} items: {ITEMS} written, 0 already there, 0 failed" in said
    assert len(list(output.iterdir())) == ITEMS
    for path in output.iterdir():
        assert from_file(path.read_bytes()).shape == (64, 64, 3)
    assert max(Counter(wrote(work)).values()) == 1
    assert len(list(work.glob("worker*/server/output/ray/*.png"))) == ITEMS


@pytest.fixture
def cluster(monkeypatch):
    """The address of a cluster that somebody has started: two CPUs, no GPU."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or it depends on whether the user has a token
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # a short name, since sockets lie in it
        address = f"127.0.0.1:{free_port()}"
        start = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            "--num-cpus=2",
            "--num-gpus=0",
        ]
        start += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"]
        start += ["--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}"]
        head = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert head.stdout is not None
        said = ""
        while "Ray runtime started" not in said:
            line = head.stdout.readline()
            assert line, said
            said += line
        yield address
        head.terminate()
        try:
            head.communicate(timeout=60)
        finally:
            head.kill()


def test_a_cluster_that_runs_already_takes_workers_on_the_cpu_and_refuses_gpus_that_it_has_not(cluster, host, tmp_path):
    manifest = make_manifest(tmp_path / "pictures", 4, side=64)
    workflow = tmp_path / "workflow.json"
    workflow.write_text(json.dumps(batch_graph("", "ray", steps=2)))
    command = [
        sys.executable, REPO / "scripts" / "ray_edit.py", "--address", cluster, "--manifest", manifest, "--workflow", workflow,
        "--output", tmp_path / "edited", "--work", tmp_path / "work", "--comfyui", host.comfyui,
    ]  # fmt: skip
    refused = subprocess.run([*command, "--gpus", "3"], capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 1
    assert "Error: Ray finds 0 GPUs. Name at most as many with --gpus" in refused.stderr
    assert not (tmp_path / "work").exists()
    done = subprocess.run([*command, "--cpus", "2"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 items: 4 written, 0 already there, 0 failed" in done.stdout
    assert len(list((tmp_path / "edited").iterdir())) == len(wrote(tmp_path / "work")) == 4


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Working:
    """Delivers each item at once."""

    def ready(self) -> int:
        return os.getpid()

    def edit(self, parcel) -> Delivered:
        return Delivered({task.result: to_png(picture(0)) for task in parcel.tasks}, {})


class Gone(Working):
    """As a worker whose ComfyUI can't be started again."""

    def ready(self) -> int:
        raise OSError("no card")

    def edit(self, parcel) -> Delivered:
        raise OSError("no card")


class OneUnstarted(Working):
    """As workers of which the first's ComfyUI can't be started in the first place."""

    def __init__(self, host, work, *rest):
        if work.name == "worker0":
            raise OSError("no card")


class Stuck(Gone):
    """Fails, and is not ready again for a long time."""

    def __init__(self):
        self._asked = 0

    def ready(self) -> int:
        self._asked += 1
        time.sleep(60 * (self._asked - 1))
        return os.getpid()

    def edit(self, parcel) -> Delivered:
        handed_out().touch()
        return super().edit(parcel)


class Second(Working):
    """Begins when a stuck worker has got items."""

    def ready(self) -> int:
        while not handed_out().exists():
            time.sleep(0.1)
        return super().ready()


def handed_out() -> Path:
    """A file that the workers of one test share."""
    return Path(os.environ["HANDED_OUT"])


class Poisoned(Working):
    """Dies of one item, and takes along what waits for it."""

    def edit(self, parcel) -> Delivered:
        if any(task.item.name == "picture18" for task in parcel.tasks):
            os._exit(1)
        return super().edit(parcel)


@pytest.fixture
def finished(tmp_path):
    """Runs a manifest of 20 items, one of whose pictures goes away, on workers of these classes, each of which needs so
    many of the one GPU that Ray believes in."""
    paths = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path), "HANDED_OUT": str(tmp_path / "handed out")}}
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, runtime_env=paths)

    def finish(*classes, gpus=0, workers=None):
        manifest = make_manifest(tmp_path / "pictures", 20, side=64)
        run = ManifestRun(batch_graph("", "ray"), manifest, tmp_path / "edited")
        options = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": 2}
        workers = workers or [ray.remote(each).options(**options).remote() for each in classes]
        shown = []

        def show(summary, final):
            shown.append(final)
            if len(shown) == 1:
                (tmp_path / "pictures" / "picture19.png").unlink()

        return ray_edit.RayRun(run, tmp_path / "edited", workers, show).finish()

    yield finish
    ray.shutdown()


def test_a_worker_that_cannot_start_again_takes_no_items_with_it(finished, tmp_path):
    summary = finished(Gone, Working)
    assert summary.written == len(list((tmp_path / "edited").iterdir())) == 19
    (bad,) = summary.failed
    assert "picture19.png" in bad.reason


def test_a_worker_that_cannot_be_started_is_left_out(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ray_edit, "EditWorker", OneUnstarted)
    monkeypatch.setattr(ray_edit, "SCRIPTS", os.pathsep.join(sys.path))
    summary = finished(workers=ray_edit.start_workers(2, True, None, tmp_path / "work", {}, []))
    assert (summary.written, len(summary.failed)) == (19, 1)
    assert "A worker is left out, 1 are left. OSError: no card" in capsys.readouterr().out


def test_the_others_do_not_wait_for_a_worker_that_does_not_work(finished, monkeypatch, capsys):
    monkeypatch.setattr(ray_edit, "READY_S", 15.0)
    begin = time.monotonic()
    summary = finished(Stuck, Second)
    assert (summary.written, len(summary.failed)) == (19, 1)
    assert time.monotonic() - begin < 50
    assert "A worker is left out, 1 are left." in capsys.readouterr().out


def test_a_worker_that_gets_no_place_is_not_waited_for_without_end(finished, monkeypatch, capsys):
    monkeypatch.setattr(ray_edit, "READY_S", 15.0)
    summary = finished(Working, Working, gpus=1)
    assert (summary.written, len(summary.failed)) == (19, 1)
    assert "has not answered for 15 s" in capsys.readouterr().out


def test_an_item_that_kills_its_worker_is_the_only_one_to_blame(finished):
    summary = finished(Poisoned)
    assert summary.written == 18
    assert sorted(bad.name for bad in summary.failed) == ["picture18", "picture19"]
    assert any("alone" in bad.reason for bad in summary.failed)


def test_what_a_lost_machine_had_ready_is_made_again(finished, monkeypatch):
    """Results lie where they were made until they are fetched; Ray then says that they are lost, and not the worker."""
    lost, get = [], ray.get

    def get_later(answer):
        delivered = get(answer)
        if isinstance(delivered, Delivered) and not lost:
            lost.append(answer)
            raise ray.exceptions.ObjectLostError(answer.hex(), "", "")
        return delivered

    monkeypatch.setattr(ray, "get", get_later)
    summary = finished(Working)
    assert lost
    assert (summary.written, len(summary.failed)) == (19, 1)


def test_a_run_without_workers_ends_and_blames_no_item(finished, tmp_path):
    with pytest.raises(JobError, match=r"No worker is left.*no card"):
        finished(Gone, Gone)
    assert not list((tmp_path / "edited").glob("*"))
