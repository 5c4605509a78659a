"""ray_edit.py on a local cluster of two workers on the CPU, one of them killed in mid-run: everything is done once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest
from array_client import from_file, to_png
from batches import batch_graph
from comfy_host import REPO
from edit_job import JobError
from edit_worker import Delivered
from edits import picture
from killing import make_manifest
from manifest_run import ManifestRun

ray = pytest.importorskip("ray")
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


@pytest.fixture
def finished(tmp_path):
    """Runs a manifest of 20 items, one of whose pictures goes away, on workers of these classes."""
    paths = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=paths)

    def finish(*classes):
        from ray_edit import RayRun

        manifest = make_manifest(tmp_path / "pictures", 20, side=64)
        run = ManifestRun(batch_graph("", "ray"), manifest, tmp_path / "edited")
        workers = [ray.remote(each).options(num_cpus=0).remote() for each in classes]
        shown = []

        def show(summary, final):
            shown.append(final)
            if len(shown) == 1:
                (tmp_path / "pictures" / "picture19.png").unlink()

        return RayRun(run, tmp_path / "edited", workers, show).finish()

    yield finish
    ray.shutdown()


def test_a_worker_that_cannot_start_again_takes_no_items_with_it(finished, tmp_path):
    summary = finished(Gone, Working)
    assert summary.written == len(list((tmp_path / "edited").iterdir())) == 19
    (bad,) = summary.failed
    assert "picture19.png" in bad.reason


def test_a_run_without_workers_ends_and_blames_no_item(finished, tmp_path):
    with pytest.raises(JobError, match=r"No worker is left.*no card"):
        finished(Gone, Gone)
    assert not list((tmp_path / "edited").iterdir())
