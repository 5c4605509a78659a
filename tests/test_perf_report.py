"""What the report says: one line of advice by rules on recorded facts, sums that hold, files for other programs."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_edit import perf
from qwen_edit.perf import advice as rules
from qwen_edit.perf.memory import MAX_POINTS, MemoryTrace

REPO = Path(__file__).resolve().parents[1]


def record(
    stages: dict[str, float], *, steps=(), first=None, cold=False, device="NVIDIA H100", busy=95.0, **facts
) -> dict:
    """A record whose stages (ms) were spent in one node each; `steps` are those of the denoising, in ms."""
    wall = sum(stages.values())
    nodes, at = [], 0.0
    for stage, ms in stages.items():
        if stage != "host":
            one = {
                "id": stage,
                "class_type": "SaveImage" if stage == "save" else stage.title(),
                "stage": stage,
                "at_ms": at,
                "ms": ms,
                "device_ms": None,
            }
            nodes.append(one | {"cached": False})
            at += ms
            if stage == "denoise":
                listed = {"count": len(steps) + 1, "source": "engine", "first_ms": first or 1.0, "ms": list(steps)}
                nodes[-1]["steps"] = listed | {"device_ms": []}
    return {
        "format": 2,
        "time": "2026-11-22T20:00:00.000+00:00",
        "prompt_id": "p",
        "status": "success",
        "wall_ms": wall,
        "cold": cold,
        "models_loaded": ["Model"] if cold else [],
        "graph": "g",
        "stages": {name: {"ms": ms, "share": ms / wall, "device_ms": None} for name, ms in stages.items()},
        "nodes": nodes,
        "spans": [],
        "taps": [],
        "facts": facts,
        "memory": {"at_ms": [0.0, wall], "device_mib": None, "rss_mib": [1000.0, 1100.0]},
        "device": {"name": device, "utilisation_mean": busy},
        "process": {"rss_mib_max": 1100.0},
    }


def saved_by(one: dict, **ms: float) -> dict:
    """The record with these nodes in place of the one that saves."""
    (save,) = (node for node in one["nodes"] if node["stage"] == "save")
    one["nodes"].remove(save)
    one["nodes"] += [save | {"id": kind, "class_type": kind, "ms": taken} for kind, taken in ms.items()]
    return one


SAVING = {"save": 600.0, "denoise": 300.0, "host": 10.0}
EDIT = {"preprocess": 30.0, "denoise": 900.0, "decode": 50.0, "host": 20.0}


@pytest.mark.parametrize(
    ("code", "one"),
    [
        ("loading", record({"load": 9000.0, "denoise": 2000.0, "host": 10.0}, cold=True)),
        ("encoding", record({"preprocess": 600.0, "denoise": 300.0, "host": 10.0}, steps=[70.0] * 3)),
        ("native_encoding", record({"preprocess": 600.0, "denoise": 300.0}, steps=[70.0] * 3, native_encoding=True)),
        ("native_forward", record(EDIT, steps=[22.0] * 39, first=22.0, true_cfg_scale=4.0, native_forward=True)),
        ("decoding", record({"decode": 600.0, "denoise": 300.0, "host": 10.0}, steps=[70.0] * 3)),
        ("saving", record({"save": 600.0, "denoise": 300.0, "host": 10.0}, steps=[70.0] * 3)),
        ("saving_much", saved_by(record(SAVING, steps=[70.0] * 3), QwenEditSave=600.0)),
        ("saving_much", saved_by(record(SAVING, steps=[70.0] * 3), QwenEditSave=500.0, SaveImage=100.0)),
        ("saving", saved_by(record(SAVING, steps=[70.0] * 3), QwenEditSave=100.0, SaveImage=500.0)),
        ("saving_much", saved_by(record(SAVING, steps=[70.0] * 3), PreviewImage=600.0)),
        ("host", record({"denoise": 300.0, "host": 600.0}, steps=[70.0] * 3)),
        ("first_step", record({"denoise": 1000.0, "host": 1.0}, steps=[50.0] * 4, first=800.0)),
        ("streaming", record(EDIT, steps=[220.0] * 3, first=220.0, streamed=True, true_cfg_scale=4.0)),
        ("attention", record(EDIT, steps=[220.0] * 3, first=220.0, attention="pytorch", attention_fell_back=True)),
        ("guidance", record(EDIT, steps=[22.0] * 39, first=22.0, true_cfg_scale=4.0)),
        ("many_steps", record(EDIT, steps=[15.0] * 59, first=15.0, true_cfg_scale=5.0)),
        ("cpu", record(EDIT, steps=[22.0] * 39, first=22.0, true_cfg_scale=4.0, device="cpu", busy=None)),
        ("cpu", record(EDIT, steps=[22.0] * 39, first=22.0, native_forward=True, device="cpu", busy=None)),
        ("idle_card", record(EDIT, steps=[220.0] * 3, first=220.0, busy=30.0)),
        ("fine", record(EDIT, steps=[220.0] * 3, first=220.0, true_cfg_scale=1.0)),
        ("cached", record({"save": 10.0, "host": 5.0})),
        ("error", record(EDIT, steps=[220.0] * 3) | {"status": "interrupted"}),
    ],
)
def test_the_advice_is_on_what_costs_most(code, one):
    told = perf.advise(one)
    assert told.code == code
    assert "{" not in told.sentence
    assert told.sentence.endswith(".")


def test_every_rule_has_a_test_and_every_text_a_rule():
    marks = test_the_advice_is_on_what_costs_most.pytestmark
    tried = {code for code, _ in marks[0].args[1]} | {"loading_again"}
    assert tried == set(rules.TEXTS)


def test_a_cold_run_after_a_cold_run_is_a_card_that_is_too_small():
    one = record({"load": 9000.0, "denoise": 2000.0, "host": 10.0}, cold=True)
    assert perf.advise(one, before=one).code == "loading_again"
    assert perf.advise(one, before=record(EDIT)).code == "loading"


def test_drawing_the_report_is_not_held_against_the_run():
    plain, drawn = (record(EDIT | extra, device="cpu", busy=None) for extra in ({}, {"report": 5000.0}))
    assert perf.advise(drawn) == perf.advise(plain)


def test_lightning_and_few_steps_hear_nothing_about_guidance():
    for steps, cfg in ((39, 1.0), (7, 4.0)):
        one = record(EDIT, steps=[20.0] * steps, first=20.0, true_cfg_scale=cfg)
        assert perf.advise(one).code == "fine"


def test_both_languages_hold_the_texts_with_the_same_blanks():
    for language in ("en", "zh"):
        main = json.loads((REPO / "locales" / language / "main.json").read_text("utf-8"))
        texts = main["qwenEditPerf"]["advice"]
        assert set(texts) == set(rules.TEXTS)
        for code, text in texts.items():
            if language == "en":
                assert text == rules.TEXTS[code]
            assert _blanks(text) <= _blanks(rules.TEXTS[code]), code


def _blanks(text: str) -> set[str]:
    import string

    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_rows_of_the_table_add_up_to_the_wall_time():
    one = record({"load": 12.3, "denoise": 45.6, "save": 7.8, "host": 3.4})
    table = perf.report_table(one, [], perf.advise(one))
    rows = table.split("node", 1)[1].splitlines()[1:]
    parsed = [(" ".join(row.split()[:-3]), float(row.split()[-3])) for row in rows if row.split()[-1] == "-"]
    assert sum(ms for _, ms in parsed) == pytest.approx(one["wall_ms"], abs=0.05)
    assert parsed[-1][0] == "between the nodes"
    assert parsed[-1][1] == pytest.approx(3.4)


def test_a_real_run_adds_up_by_nodes_and_by_stages():
    run = perf.Run()
    perf.activate(run)
    try:
        for node_id, kind in (("1", "LoadImage"), ("2", "QwenEditSampler"), ("3", "SaveImage")):
            run.node_started(node_id, kind)
            if node_id == "2":
                for _ in range(3):
                    perf.record_step()
                with perf.stage("load"):
                    sum(range(10_000))
            run.node_finished(node_id)
    finally:
        perf.deactivate(run)
    one = run.record()
    assert perf.between_nodes_ms(one) == pytest.approx(one["stages"]["host"]["ms"], abs=0.4)
    assert perf.between_nodes_ms(one) >= -0.2
    assert len(one["memory"]["at_ms"]) == 1 + 3 * 2 + 3


def test_memory_is_looked_at_more_rarely_the_longer_it_takes():
    trace = MemoryTrace(None)
    for at in range(5000):
        trace.look(float(at))
    kept = trace.record()
    assert MAX_POINTS / 4 <= len(kept["at_ms"]) < MAX_POINTS
    assert kept["at_ms"] == sorted(kept["at_ms"])
    assert kept["at_ms"][-1] > 4900
    assert all(100 > mib > 0 or mib >= 100 for mib in kept["rss_mib"])


def test_earlier_runs_are_those_of_the_same_graph_that_sampled():
    one = record(EDIT) | {"prompt_id": "now"}
    log = [
        record(EDIT) | {"prompt_id": "a"},
        record(EDIT) | {"prompt_id": "other graph", "graph": "h"},
        record(EDIT) | {"prompt_id": "failed", "status": "error"},
        record({"save": 3.0, "host": 1.0}) | {"prompt_id": "all cached"},
        record(EDIT) | {"prompt_id": "b"},
        one,
        {key: value for key, value in record(EDIT).items() if key != "graph"} | {"prompt_id": "an old line"},
    ]
    assert [other["prompt_id"] for other in perf.previous_runs(one, log, 5)] == ["b", "a"]
    assert [other["prompt_id"] for other in perf.previous_runs(one, log, 1)] == ["b"]


def test_the_csv_holds_what_the_record_holds():
    one = record(EDIT, steps=[20.0, 21.0], first=30.0)
    rows = list(csv.DictReader(io.StringIO(perf.as_csv(one))))
    by_kind = {
        kind: [row for row in rows if row["kind"] == kind] for kind in ("run", "stage", "node", "step", "memory")
    }
    assert float(by_kind["run"][0]["ms"]) == one["wall_ms"]
    assert sum(float(row["ms"]) for row in by_kind["stage"]) == pytest.approx(one["wall_ms"])
    assert [float(row["ms"]) for row in by_kind["step"]] == [30.0, 20.0, 21.0]
    assert [row["step"] for row in by_kind["step"]] == ["1", "2", "3"]
    assert len(by_kind["node"]) == 3
    assert [float(row["rss_mib"]) for row in by_kind["memory"]] == [1000.0, 1100.0]
    told = json.loads(perf.as_json(one, perf.advise(one)))
    assert told["wall_ms"] == one["wall_ms"]
    assert told["advice"]["sentence"] == perf.advise(one).sentence


def test_device_times_of_steps_lie_beside_their_own_step():
    one = record(EDIT, steps=[20.0, 21.0], first=30.0)
    one["nodes"][1]["steps"]["device_ms"] = [19.0, 20.5]  # the first step's is not listed
    rows = [row for row in csv.DictReader(io.StringIO(perf.as_csv(one))) if row["kind"] == "step"]
    assert [row["device_ms"] for row in rows] == ["", "19.0", "20.5"]


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.json"
    perf.write_whole(path, "one")
    perf.write_whole(path, "two")
    assert path.read_text("utf-8") == "two"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen_edit.perf.log.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        perf.write_whole(path, "three")
    assert path.read_text("utf-8") == "two"
    assert [one.name for one in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_chart_is_drawn_for_whatever_was_recorded(theme):
    pytest.importorskip("matplotlib")
    from qwen_edit.perf.chart import draw_report

    on_card = record(EDIT, steps=[20.0] * 100, first=3000.0)
    on_card["nodes"][1] |= {"device_ms": 800.0}
    on_card["nodes"][1]["steps"]["device_ms"] = [19.0] * 100
    on_card["memory"]["device_mib"] = [0.0, 20000.0]
    for one, earlier in (
        (record(EDIT, steps=[20.0] * 3), []),
        (on_card, [on_card, on_card]),
        (record({"save": 0.3, "host": 0.1}), []),
        (run_of_nothing(), []),
        (run_of_nothing() | {"wall_ms": 0.0}, []),
    ):
        picture = draw_report(one, earlier, perf.advise(one), theme)
        assert picture.shape[1:] == (900, 3)
        assert picture.std() > 5


def run_of_nothing() -> dict:
    return perf.Run().record("so far")


def test_importing_brings_no_matplotlib_and_no_kornia():
    code = (
        "import sys, qwen_edit.perf, qwen_edit.perf.chart, qwen_edit.sweep, qwen_edit.sweep_chart;"
        "print([name for name in ('matplotlib', 'kornia') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_a_batch_is_not_advised_by_the_steps_of_all_its_items():
    short = record({"denoise": 900.0, "host": 10.0}, steps=[9.0] * 99) | {"facts": {"steps": 8, "true_cfg_scale": 1.0}}
    assert perf.advise(short).code == "fine"
    guided = short | {"facts": {"steps": 40, "true_cfg_scale": 4.0}}
    assert perf.advise(guided).sentence.startswith("Guidance (CFG 4) runs the model twice in each of 40 steps.")
    long = short | {"facts": {"steps": 60, "true_cfg_scale": 4.0}}
    assert perf.advise(long).sentence.startswith("60 steps take")
