"""The clocks, the record they make, and a log file that never gets in the way."""

import gc
import json
import logging
import subprocess
import sys
import threading
import time

import pytest
import torch

from qwen_edit import perf
from qwen_edit.perf import log as perf_log
from qwen_edit.perf import run as perf_run


@pytest.fixture(autouse=True)
def _nothing_stays_active():
    yield
    run = perf.active_run()
    if run is not None:
        perf.deactivate(run)
        pytest.fail("a run was left active")


class Clock:
    """Time that passes only in `wait`."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    time = staticmethod(time.time)


CLOCK = Clock()


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    monkeypatch.setattr(perf_run, "time", CLOCK)


def wait(ms: float) -> None:
    CLOCK.now += ms / 1000


def close(got: float, expected: float) -> bool:
    return got == pytest.approx(expected, abs=0.11)


# Stages


def test_shares_add_up_and_time_counts_where_it_was_spent():
    with perf.recording() as run:
        with perf.stage("denoise"):
            wait(20)
            with perf.stage("load"):
                wait(40)
                with perf.stage("lora"):
                    wait(30)
            wait(10)
        wait(15)
    record = run.record()
    stages = record["stages"]
    assert close(stages["denoise"]["ms"], 30)
    assert close(stages["load"]["ms"], 40)
    assert close(stages["lora"]["ms"], 30)
    assert close(stages["host"]["ms"], 15)
    assert sum(entry["share"] for entry in stages.values()) == pytest.approx(1, abs=0.002)
    assert sum(entry["ms"] for entry in stages.values()) == pytest.approx(record["wall_ms"], abs=0.5)
    assert [name for name in stages] == ["load", "lora", "denoise", "host"]
    (span,) = record["spans"]
    assert span["stage"] == "denoise"
    assert close(span["ms"], 100)
    assert set(span["inner"]) == {"load", "lora"}


def test_nothing_is_recorded_and_nothing_costs_without_a_run():
    started = time.perf_counter()
    for _ in range(20_000):
        with perf.stage("denoise"):
            perf.record_step()
    assert time.perf_counter() - started < 1  # 50 µs each, on a slow and busy machine
    assert perf.active_run() is None


def test_a_stage_ends_when_its_code_raises():
    def fail():
        with perf.stage("decode"):
            wait(5)
            raise RuntimeError("boom")

    with perf.recording() as run:
        with pytest.raises(RuntimeError, match="boom"):
            fail()
        wait(30)
    assert run.record()["stages"]["decode"]["ms"] == 5


def test_recording_ends_when_its_code_is_interrupted():
    with pytest.raises(KeyboardInterrupt), perf.recording(), perf.stage("denoise"):
        raise KeyboardInterrupt
    assert perf.active_run() is None


def test_deactivating_an_old_run_leaves_the_new_one():
    old, new = perf.Run(), perf.Run()
    perf.activate(old)
    perf.activate(new)
    perf.deactivate(old)
    assert perf.active_run() is new
    perf.deactivate(new)
    assert perf.active_run() is None


def test_work_on_other_threads_is_kept_apart():
    def load():
        with perf.stage("load"):
            wait(30)

    with perf.recording() as run, perf.stage("denoise"):
        threads = [threading.Thread(target=load) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    record = run.record()
    assert "load" not in record["stages"]
    assert sum(entry["share"] for entry in record["stages"].values()) == pytest.approx(1, abs=0.002)
    assert [span["stage"] for span in record["spans"]].count("load") == 8


def test_steps_announced_by_the_engine():
    with perf.recording() as run, perf.stage("denoise"):
        for ms in (40, 10, 20, 10):
            wait(ms)
            perf.record_step()
    steps = run.record()["spans"][0]["steps"]
    assert (steps["count"], steps["source"]) == (4, "engine")
    assert close(steps["first_ms"], 40)
    assert all(close(got, expected) for got, expected in zip(steps["ms"], (10, 20, 10), strict=True))
    assert steps["device_ms"] == []


def test_a_step_outside_of_any_stage_is_passed_over():
    with perf.recording() as run:
        perf.record_step()
    assert run.record()["spans"] == []


# Nodes


def test_nodes_stages_inside_them_and_cached_ones():
    run = perf.Run(run_id="p")
    run.node_started("1", "QwenEditLoader")
    wait(10)
    run.node_finished("1")
    run.node_started("7", "QwenEditSampler")
    perf.activate(run)
    with perf.stage("load"):
        wait(30)
    perf.deactivate(run)
    wait(20)
    run.node_finished("7")
    run.node_cached("2", "LoadImage")
    run.node_cached("7", "QwenEditSampler")
    record = run.record()
    loader, sampler, cached = record["nodes"]
    assert (loader["id"], loader["class_type"], loader["stage"]) == ("1", "QwenEditLoader", "load")
    assert close(sampler["ms"], 50)
    assert close(sampler["inner"]["load"], 30)
    assert close(record["stages"]["load"]["ms"], 40)
    assert close(record["stages"]["denoise"]["ms"], 20)
    assert (cached["id"], cached["cached"], cached["ms"]) == ("2", True, 0.0)
    assert record["prompt_id"] == "p"


def test_a_node_that_steps_aside_for_others_does_not_count_their_time():
    run = perf.Run()
    run.node_started("switch", "ComfySwitchNode")
    wait(10)
    run.node_started("inner", "KSampler")
    wait(40)
    run.node_finished("inner")
    run.node_started("switch", "ComfySwitchNode")
    wait(10)
    run.node_finished("switch")
    switch, inner = run.record()["nodes"]
    assert close(switch["ms"], 20)
    assert close(inner["ms"], 40)


def test_finishing_a_node_that_never_started_is_harmless():
    run = perf.Run()
    run.node_finished("3")
    run.progress("3", 1)
    assert run.record()["nodes"] == []


def test_steps_from_a_progress_bar_that_skips_and_restarts():
    run = perf.Run()
    run.node_started("7", "KSampler")
    wait(30)
    run.progress("7", 1)
    wait(20)
    run.progress("7", 3)  # two steps at once
    wait(30)
    run.progress("7", 1)  # a second sampler in the same node
    wait(10)
    run.progress("7", 2)
    run.node_finished("7")
    run.progress("7", 3)  # late: the node is over
    steps = run.record()["nodes"][0]["steps"]
    assert (steps["count"], steps["source"]) == (4, "progress")
    assert close(steps["first_ms"], 30)
    assert len(steps["ms"]) == 3
    assert close(steps["ms"][0], 10)
    assert steps["ms"][0] == steps["ms"][1]
    assert close(steps["ms"][2], 10)


def test_the_number_of_listed_steps_is_bounded():
    run = perf.Run()
    run.node_started("7", "ImageUpscaleWithModel")
    for value in range(1, 5001):
        run.progress("7", value)
    run.node_finished("7")
    steps = run.record()["nodes"][0]["steps"]
    assert len(steps["ms"]) == 200
    assert steps["count"] == 5000
    assert len(json.dumps(run.record())) < 10_000


def test_a_batch_of_any_length_is_counted_to_its_end_in_little_memory():
    """3,000 items with two stages and two steps each, a stage in a stage, and a node after them."""
    run = perf.Run()
    run.node_started("7", "QwenEditBatch")
    perf.activate(run)
    for _ in range(3000):
        with perf.stage("preprocess"):
            wait(2)
        with perf.stage("denoise"):
            with perf.stage("load"):
                wait(1)
            for _ in range(2):
                wait(3)
                perf.record_step()
        wait(1)
    with perf.stage("save"):
        wait(50)
        open_yet = run.record("running", wait=False)
    perf.deactivate(run)
    run.node_finished("7")
    run.node_started("8", "SaveImage")
    wait(40)
    run.node_finished("8")
    record = run.record()
    assert [node["id"] for node in record["nodes"]] == ["7", "8"]
    batch, after = record["nodes"]
    expected = {"load": 3000, "preprocess": 6000, "denoise": 21_000, "save": 90, "host": 0}
    assert {name: entry["ms"] for name, entry in record["stages"].items()} == pytest.approx(expected, abs=0.2)
    assert batch["inner"] == pytest.approx({"load": 3000, "preprocess": 6000, "denoise": 18_000, "save": 50}, abs=0.2)
    assert open_yet["nodes"][0]["inner"] == pytest.approx(batch["inner"], abs=0.2)
    assert open_yet["stages"]["save"]["ms"] == 50
    assert (batch["ms"], after["ms"]) == pytest.approx((30_050, 40), abs=0.2)
    assert batch["steps"]["count"] == 6000
    assert len(batch["steps"]["ms"]) == 200
    kept = sum(type(one) is perf_run.Span for one in gc.get_objects())
    assert kept < 1100  # as many as have steps that can be listed


def test_a_run_that_failed_counts_the_open_node_up_to_its_end():
    run = perf.Run()
    run.node_started("7", "KSampler")
    wait(10)
    error = {"node_id": "7", "class_type": "KSampler", "type": "ValueError", "code": "QE_INPUT"}
    record = run.record("error", total_ms=1000, error=error)
    assert record["wall_ms"] == 1000
    assert record["nodes"][0]["ms"] == pytest.approx(1000, abs=5)
    assert record["error"] == error


@pytest.mark.parametrize(
    ("class_type", "stage"),
    [
        ("VAEDecode", "decode"),
        ("UNETLoader", "load"),
        ("VAELoader", "load"),
        ("QwenEditLoader", "load"),
        ("LoadImage", "preprocess"),
        ("ImageScale", "preprocess"),
        ("QwenEditSmartResize", "preprocess"),
        ("QwenEditEncode", "preprocess"),
        ("KSampler", "denoise"),
        ("SamplerCustom", "denoise"),
        ("QwenEditSampler", "denoise"),
        ("QwenEditLoraSwitch", "lora"),
        ("LoraLoader", "lora"),
        ("QwenEditRestoreSize", "postprocess"),
        ("SaveImage", "save"),
        ("SomethingElse", "other"),
    ],
)
def test_stage_of(class_type, stage):
    assert perf.stage_of(class_type) == stage


def test_the_record_is_json_with_the_machine_in_it():
    with perf.recording() as run, perf.stage("denoise"):
        wait(30)
        run.tap("here", "5")
    run.models_loaded.append("QwenImage")
    record = json.loads(json.dumps(run.record(), allow_nan=False))
    assert record["format"] == 2
    assert record["cold"] is True
    assert record["models_loaded"] == ["QwenImage"]
    assert record["taps"][0]["label"] == "here"
    assert 50 < record["process"]["rss_mib_max"] < record["process"]["ram_total_mib"]
    assert record["process"]["cpu_percent"] >= 0
    assert record["time"].endswith("+00:00")
    assert "text" not in record
    assert "error" not in record


def test_the_table_names_every_stage_and_the_steps():
    run = perf.Run()
    run.node_started("7", "QwenEditSampler")
    for value in (1, 2, 3):
        run.progress("7", value)
    run.node_finished("7")
    with run.stage("something new"):
        pass
    lines = perf.stage_table(run.record()).splitlines()
    assert lines[0].split() == ["stage", "ms", "share", "device", "ms"]
    assert [line.split()[0] for line in lines[1:5]] == ["denoise", "host", "something", "total"]
    assert "QwenEditSampler: 3 steps" in lines[5]
    assert lines[6].startswith("success, warm")


def test_importing_touches_neither_the_card_nor_comfyui():
    code = (
        "import sys, torch, qwen_edit.perf, qwen_edit.geometry\n"
        "assert not torch.cuda.is_initialized()\n"
        "bad = {'comfy', 'folder_paths', 'server', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    root = str(perf_log.Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


# The log


@pytest.fixture
def path(tmp_path):
    return tmp_path / "qwen_edit_perf" / "perf.jsonl"


def test_lines_come_back_in_order(path):
    for number in range(5):
        assert perf.append_record(path, {"number": number, "label": "line\nbreak \u2028 日本 \ud800"})
    records = perf.read_records(path)
    assert [record["number"] for record in records] == [0, 1, 2, 3, 4]
    assert records[0]["label"] == "line\nbreak \u2028 日本 \ud800"
    assert perf.read_records(path.with_name("absent.jsonl")) == []


def test_the_log_is_rotated_and_bounded(path):
    record = {"filler": "x" * 100}
    for _ in range(100):
        perf.append_record(path, record, max_bytes=1000, files=3)
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == ["perf.jsonl", "perf.jsonl.1", "perf.jsonl.2"]
    assert all(file.stat().st_size <= 1000 for file in path.parent.iterdir())
    assert all(perf.read_records(file) for file in path.parent.iterdir())


def test_a_line_cut_off_by_a_crash_spoils_no_other(path):
    perf.append_record(path, {"number": 1})
    with path.open("ab") as file:
        file.write(b'{"number": 2, "sta')
    perf.append_record(path, {"number": 3})
    assert [record["number"] for record in perf.read_records(path)] == [1, 3]


def test_many_writers_do_not_mix_their_lines(path):
    def write(number):
        for _ in range(50):
            perf.append_record(path, {"number": number, "filler": "y" * 500})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(perf.read_records(path)) == 400


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "qwen_edit_perf").write_text("a file where the folder should be")
    path = tmp_path / "qwen_edit_perf" / "perf.jsonl"
    with caplog.at_level(logging.WARNING):
        assert [perf.append_record(path, {}) for _ in range(3)] == [False, False, False]
    assert len(caplog.records) == 1
    assert str(path) in caplog.text


def test_a_full_disk_costs_one_warning_and_leaves_no_half_line(path, caplog, monkeypatch):
    perf.append_record(path, {"number": 1})
    write = perf_log.os.write
    monkeypatch.setattr(perf_log.os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with caplog.at_level(logging.WARNING):
        assert not perf.append_record(path, {"number": 2})
        assert not perf.append_record(path, {"number": 3})
    monkeypatch.undo()
    assert len(caplog.records) == 1
    assert perf.append_record(path, {"number": 4})
    assert path.read_text() == '{"number":1}\n{"number":4}\n'


# With a card


class FakeEvent:
    """A CUDA event of a device that works off 10 ms for every event, and has reached `now`."""

    made = 0
    now = 0
    broken = False

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        if FakeEvent.broken:
            raise RuntimeError("CUDA error: unspecified launch failure")
        FakeEvent.made += 1
        self.at = FakeEvent.made

    def query(self):
        if FakeEvent.broken:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return self.at <= FakeEvent.now

    def synchronize(self):
        FakeEvent.now = max(FakeEvent.now, self.at)

    def elapsed_time(self, other):
        return (other.at - self.at) * 10.0


@pytest.fixture
def fake_run(monkeypatch):
    monkeypatch.setattr(FakeEvent, "made", 0)
    monkeypatch.setattr(FakeEvent, "now", 0)
    monkeypatch.setattr(FakeEvent, "broken", False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    run = perf.Run()
    run.device = torch.device("cuda", 0)
    return run


def test_device_times_are_read_afterwards(fake_run):
    fake_run.node_started("7", "QwenEditSampler")  # event 1
    with fake_run.stage("load"):  # 2, 3
        pass
    for value in (1, 2, 3):  # 4, 5, 6
        fake_run.progress("7", value)
    fake_run.node_finished("7")  # 7
    early = fake_run.record(wait=False)
    assert FakeEvent.now == 0
    assert early["nodes"][0]["device_ms"] is None
    assert early["nodes"][0]["steps"]["device_ms"] == []
    record = fake_run.record()
    (node,) = record["nodes"]
    assert node["device_ms"] == 60
    assert node["steps"]["device_ms"] == [10, 10]
    assert node["peak_mib"] == record["device"]["peak_mib"] == 3
    assert record["stages"]["load"]["device_ms"] == 10
    assert record["stages"]["denoise"]["device_ms"] == 50


def test_a_failed_device_ends_device_timing_and_nothing_else(fake_run):
    def fail():
        with fake_run.stage("load"):
            pass  # its events were recorded, and can't be read any more
        FakeEvent.broken = True
        raise ValueError("the real error")

    fake_run.node_started("7", "KSampler")
    with pytest.raises(ValueError, match="the real error"), fake_run.stage("denoise"):
        fail()
    fake_run.node_finished("7")
    FakeEvent.broken = False
    assert fake_run.record()["nodes"][0]["device_ms"] is None


def test_device_times_of_many_stages_are_summed(fake_run):
    """The device is never waited for in between, as in a batch that is faster than it."""
    fake_run.node_started("7", "QwenEditBatch")
    for number in range(2000):
        with fake_run.stage("decode"):  # 10 ms, and as much until the next
            pass
        if number == 1000:
            FakeEvent.now = FakeEvent.made
            assert fake_run.record(wait=False)["stages"]["decode"]["device_ms"] == 1001 * 10
    fake_run.node_finished("7")
    assert fake_run.record(wait=False)["stages"]["decode"]["device_ms"] is None
    stages = fake_run.record()["stages"]
    assert stages["decode"]["device_ms"] == 2000 * 10
    assert stages["denoise"]["device_ms"] == 2001 * 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_time_is_measured_without_waiting():
    device = torch.device("cuda", torch.cuda.current_device())
    work = torch.randn(4096, 4096, device=device)
    for _ in range(3):
        work @ work
    torch.cuda.synchronize()
    run = perf.Run(device)
    run.node_started("7", "KSampler")
    started = time.perf_counter()
    for value in range(1, 9):
        for _ in range(20):
            work @ work
        run.progress("7", value)
    queued = (time.perf_counter() - started) * 1000
    run.node_finished("7")
    so_far = run.record("so far", wait=False)
    record = run.record()
    steps = record["nodes"][0]["steps"]
    assert so_far["nodes"][0]["device_ms"] is None
    assert len(steps["device_ms"]) == 7
    assert min(steps["device_ms"]) > 1
    assert queued < sum(steps["device_ms"])
    assert record["nodes"][0]["device_ms"] > sum(steps["device_ms"])
    assert record["stages"]["denoise"]["device_ms"] == record["nodes"][0]["device_ms"]
    assert record["device"]["peak_mib"] >= 128
    assert record["nodes"][0]["peak_mib"] == record["device"]["peak_mib"]
    device_info = record["device"]
    assert device_info["name"] == torch.cuda.get_device_name()
    assert "utilisation_mean" in device_info or device_info["utilisation_missing"]
    assert "KSampler: 8 steps" in perf.stage_table(record)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nvml_is_asked_about_the_card_that_torch_uses():
    pynvml = pytest.importorskip("pynvml")
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        torch.zeros(1, device=device)
        monitor = perf.Monitor(device)
        assert monitor._handle is not None, monitor.device()
        assert pynvml.nvmlDeviceGetPciInfo(monitor._handle).bus == torch.cuda.get_device_properties(device).pci_bus_id
