"""scripts/queue_edit.py --manifest on the real server: results, its own restart, bad items, and a poisonous one."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import comfy_client
import manifest_run
import numpy as np
import pytest
from array_client import from_file, to_png
from bad_line import CUT, BadLine
from batches import batch_graph
from comfy_client import ComfyClient, ComfyError, PromptLost
from comfy_host import REPO
from edits import edited, picture, small_edit
from manifest_run import LOSSES, ManifestRun, Queued

from qwen_edit.manifest import hash_bytes

pytestmark = pytest.mark.server


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Five edits of three pictures, one of a picture that is not there, and one of a file that is none."""
    (tmp_path / "deep").mkdir()
    for seed, name in enumerate(("a.png", "deep/b.png", "c.png")):
        (tmp_path / name).write_bytes(to_png(picture(seed)))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    path = tmp_path / "manifest.csv"
    path.write_text(
        'picture,prompt,seed\r\na.png,,\r\ndeep/b.png,"mirror it, please",5\r\nc.png,,6\r\na.png,mirror it,\r\n'
        "gone.png,,\r\nc.png,,7\r\nbroken.png,,\r\n"
    )
    return path


def command(server, manifest: Path, workflow: Path, output: Path) -> list:
    workflow.write_text(json.dumps(batch_graph("", "manifest run")))
    return [
        sys.executable, REPO / "scripts" / "queue_edit.py", "--server", server.url, "--manifest", manifest,
        "--workflow", workflow, "--output", output,
    ]  # fmt: skip


def test_a_manifest_from_start_to_end_and_again(client, server, manifest, tmp_path):
    output = tmp_path / "edited"
    arguments = command(server, manifest, tmp_path / "workflow.json", output)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "7 items: 5 written, 0 already there, 2 failed, in" in done.stdout
    assert "line 8 (broken): [QE_INPUT] It can't be read" in done.stderr
    assert "line 6 (gone): a picture can't be read" in done.stderr
    names = sorted(path.name.rsplit("_", 1)[0] for path in output.iterdir())
    assert names == ["a", "a", "b", "c", "c"]
    (b,) = output.glob("b_*.png")
    single = edited(client, small_edit(client, picture(1), prompt="mirror it, please", seed=5))
    assert np.array_equal(from_file(b.read_bytes()), single)

    # again, with one result lost here and another lost here and on the server
    (manifest.parent / "gone.png").write_bytes(to_png(picture(8)))
    (manifest.parent / "broken.png").write_bytes(to_png(picture(9)))
    b.unlink()
    (server.output / "manifest run" / b.name).unlink()
    next(output.glob("a_*.png")).unlink()
    written = client.get("/qwen_edit/status")["counters"]["items_written"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "7 items: 4 written, 3 already there, 0 failed, in" in done.stdout
    assert client.get("/qwen_edit/status")["counters"]["items_written"] == written + 3
    assert len(list(output.iterdir())) == 7


def test_what_cannot_run_at_all_is_said_before_anything_is_queued(server, manifest, tmp_path):
    arguments = command(server, manifest, tmp_path / "workflow.json", tmp_path / "edited")
    manifest.write_text("picture,colour\na.png,red\n")
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "line 1: there is no column 'colour'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_item_that_takes_the_server_away_is_given_up_alone(server, manifest, tmp_path, monkeypatch):
    """Losing the server is played by the client: a prompt with the poison is reported lost as soon as it is followed."""
    # many steps, so that the interrupt always comes before the result
    poison = ManifestRun(batch_graph("", "poison", steps=30), manifest, tmp_path / "out", patience_s=30)
    follow = poison._follow

    def lose(client):
        if any(task.item.name == "b" for task in poison._queued[0].tasks):
            client.interrupt(poison._queued[0].prompt_id)
            raise PromptLost("gone")
        follow(client)

    monkeypatch.setattr(poison, "_follow", lose)
    summary = poison.run(server.url)
    assert (summary.written, summary.left) == (4, 0)
    assert [bad.name for bad in summary.failed] == ["gone", "b", "broken"]
    assert "alone" in summary.failed[1].reason


@pytest.fixture
def _in_a_hurry(monkeypatch):
    monkeypatch.setattr(manifest_run, "PAUSE_S", 0.02)


@pytest.mark.usefixtures("_in_a_hurry")
def test_what_goes_wrong_with_a_picture_on_its_way_fails_that_item_alone(server, tmp_path):
    """How often each goes wrong: more often than it may is for ever, but for a client that does not stop."""
    for seed, name in enumerate(("cut", "cut_once", "too_large", "proxy_restarts", "good", "result_cut")):
        (tmp_path / f"{name}.png").write_bytes(to_png(picture(100 + seed, 64, 64)))
    wrong = {"cut": (CUT, 20), "cut_once": (CUT, 1), "too_large": (413, 20), "proxy_restarts": (502, 1)}
    names = {hash_bytes(path.read_bytes())[:24]: path.stem for path in tmp_path.iterdir()}

    def rule(request, seen):
        if request.startswith("GET /view?filename=result_cut"):
            return ("result_cut", CUT) if seen["result_cut"] < 20 else None
        if not request.startswith("POST /upload/image"):
            return None
        name = next((name for key, name in names.items() if key in request), "")
        status, times = wrong.get(name, (0, 0))
        return (name, status) if seen[name] < times else None

    with BadLine(server.url, rule) as line:
        run = ManifestRun(batch_graph("", "bad line"), tmp_path, tmp_path / "out", patience_s=60)
        summary = run.run(line.url)
    assert {bad.name: bad.reason.partition(".png: ")[2] for bad in summary.failed} == {
        "cut": f"the connection broke off {LOSSES} times while a picture was uploaded; it may be too large for it",
        "too_large": "the server does not take a picture: ComfyUI answered /upload/image with status 413: (nothing)",
        "result_cut": f"the connection broke off {LOSSES} times while its result was downloaded",
    }
    assert line.wrong == {"cut": LOSSES, "cut_once": 1, "too_large": 1, "proxy_restarts": 1, "result_cut": LOSSES}
    assert (summary.written, summary.left, summary.outages) == (3, 0, 0)
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.usefixtures("_in_a_hurry")
def test_a_server_that_answers_and_takes_no_prompt_ends_the_run(server, manifest, tmp_path):
    def rule(request, seen):
        return ("prompt", 503) if request.startswith("POST /prompt") and seen["prompt"] < 100 else None

    with BadLine(server.url, rule) as line:
        run = ManifestRun(batch_graph("", "no prompt"), manifest, tmp_path / "out", patience_s=0.5)
        with pytest.raises(ComfyError, match="took nothing into its queue"):
            run.run(line.url)
    assert 1 < line.wrong["prompt"] < 100


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process")
def test_ctrl_c_ends_a_manifest_with_130_and_the_next_start_goes_on(client, server, manifest, tmp_path):
    output = tmp_path / "edited"
    workflow = tmp_path / "workflow.json"
    arguments = command(server, manifest, workflow, output)
    workflow.write_text(json.dumps(batch_graph("", "stopped", steps=50, together=1)))
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 60
    while not list(output.glob("*.png")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    while any(client.get("/queue").values()):
        assert time.monotonic() < end, "The batch still runs."
        time.sleep(0.1)
    kept = len(list(output.iterdir()))
    assert 1 <= kept < 5
    assert all(path.suffix == ".png" for path in output.iterdir())
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert f"{5 - kept} written, {kept} already there, 2 failed" in done.stdout
    assert done.returncode == 1


@pytest.mark.usefixtures("_in_a_hurry")
def test_a_server_that_stays_away_is_waited_for_as_long_as_was_asked(server, manifest, tmp_path, monkeypatch):
    """The line to it is cut after the first result, and every later request."""
    monkeypatch.setattr(comfy_client, "RECONNECT_S", 0.5)
    output = tmp_path / "out"

    def rule(request, seen):
        away = seen["away"] or (request.startswith("GET /view") and list(output.glob("*.png")))
        return ("away", CUT) if away else None

    with BadLine(server.url, rule) as line:
        run = ManifestRun(batch_graph("", "stays away"), manifest, output, patience_s=3)
        begin = time.monotonic()
        with pytest.raises(ComfyError, match=r"The server stayed away for 3 s\. No ComfyUI answers"):
            run.run(line.url)
    assert 3 < time.monotonic() - begin < 60
    assert run.summary.left >= 3
    assert len(list(output.iterdir())) == run.summary.written == 1


@pytest.mark.usefixtures("_in_a_hurry")
def test_what_a_server_says_about_no_item_ends_the_run(server, manifest, tmp_path):
    with BadLine(server.url, lambda request, _: ("no", 500) if "POST /upload" in request else None) as line:
        run = ManifestRun(batch_graph("", "no uploads"), manifest, tmp_path / "out", patience_s=30)
        with pytest.raises(ComfyError, match="status 500"):
            run.run(line.url)
    assert line.wrong == {"no": 1}
    assert not [bad for bad in run.summary.failed if bad.name != "gone"]


def test_an_item_that_was_given_up_is_not_begun_again_after_an_outage(server, manifest, tmp_path):
    """Its result could not be downloaded, and then the server went away in the middle of the chunk."""
    run = ManifestRun(batch_graph("", "given up"), manifest, tmp_path / "out")
    given_up, other = itertools.islice(run.plan(), 2)
    run._queued.append(Queued("a prompt that is lost", [given_up, other]))
    run.fail(given_up, "the connection broke off")
    with ComfyClient(server.url) as client:
        run._recover(client)
    assert list(run._again) == [other]


def test_an_item_that_stands_there_twice_shares_what_came_of_the_first(server, tmp_path):
    (tmp_path / "good.png").write_bytes(to_png(picture(120, 64, 64)))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    path = tmp_path / "manifest.csv"
    path.write_text("picture\ngood.png\nbroken.png\ngood.png\nbroken.png\n")
    summary = ManifestRun(batch_graph("", "twins"), path, tmp_path / "out").run(server.url)
    assert (summary.written, summary.already_there, summary.left) == (1, 1, 0)
    assert [bad.line for bad in summary.failed] == [3, 5]
    assert "further up" in summary.failed[1].reason
