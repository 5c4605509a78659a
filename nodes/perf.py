"""The performance logger: a tap anywhere in the graph that has the whole prompt measured."""

import datetime
import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context

from ..qwen_edit import perf
from ..qwen_edit.chart_style import NO_MATPLOTLIB, THEMES, note_picture
from ..qwen_edit.manifest import safe_name
from ..qwen_edit.values import check_choice, check_kind
from .host.perf import earlier_runs, ensure_run, so_far
from .host.perf_panel import NAME
from .pictures import as_image

MAX_LABEL = 200
EARLIER_RUNS = 4
EXPORTS = {"off": (), "JSON": ("json",), "CSV": ("csv",), "JSON and CSV": ("json", "csv")}
NOT_MEASURED = "Not measured: ComfyUI's queue is not running this."


def theme_input() -> io.Combo.Input:
    """Of the nodes that draw a chart."""
    return io.Combo.Input(
        "theme",
        options=list(THEMES),
        default="dark",
        optional=True,
        advanced=True,
        tooltip="Colours of the chart. dark also reads well on a light canvas.",
    )


def _begin() -> None:
    try:
        ensure_run()
    except Exception:
        logging.warning("Qwen Edit Fast: this prompt is not measured.", exc_info=True)


class QwenEditPerfLogger(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        template = io.MatchType.Template("value")
        return io.Schema(
            node_id="QwenEditPerfLogger",
            display_name="Qwen Edit Perf Logger",
            category="Qwen Edit Fast",
            description="Measures the prompt it is part of: time per node, stage and step, memory, and how "
            "busy CPU and GPU were. One line per prompt goes to qwen_edit_perf/perf.jsonl in the output "
            "folder.",
            search_aliases=["performance", "profile", "benchmark", "timing", "memory"],
            inputs=[
                io.MatchType.Input(
                    "value",
                    template=template,
                    tooltip="Anything. It is passed on unchanged; where the logger sits only decides when "
                    "the table on the node is taken.",
                ),
                io.String.Input(
                    "label",
                    default="",
                    optional=True,
                    tooltip="Name of this tap in the log, to tell runs or places apart. It is written as it is.",
                ),
                io.Boolean.Input(
                    "include_text",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Also write the prompt's text inputs, file names included. Off, the log holds "
                    "numbers, node types and labels only.",
                ),
            ],
            outputs=[io.MatchType.Output(template=template, display_name="value", tooltip="The same value.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs):
        """Called by ComfyUI before the first node of every prompt. Never changes, so nothing reruns."""
        _begin()
        return ""

    @classmethod
    def execute(cls, value, label="", include_text=False) -> io.NodeOutput:
        check_kind("label", label, str, "a text")
        check_kind("include_text", include_text, bool, "true or false")
        run = ensure_run()
        if run is None:
            return io.NodeOutput(value, ui=ui.PreviewText(NOT_MEASURED))
        context = get_executing_context()
        run.tap(label[:MAX_LABEL], context.node_id if context else None)
        return io.NodeOutput(value, ui=ui.PreviewText(perf.stage_table(run.record("so far", wait=False))))


class QwenEditPerfReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QwenEditPerfReport",
            display_name="Qwen Edit Perf Report",
            category="Qwen Edit Fast",
            description="Draws where the time of this run went: per stage, node and step, beside earlier runs, with "
            "memory over time, and one line on what to try. It measures native nodes too.",
            search_aliases=["performance", "profile", "benchmark", "timing", "chart", "slow"],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The result of the edit, passed on unchanged: the report covers what ran before it.",
                ),
                io.Combo.Input(
                    "export",
                    options=list(EXPORTS),
                    default="off",
                    optional=True,
                    advanced=True,
                    tooltip="Also write the numbers into the folder qwen_edit_perf of ComfyUI's output folder, one file "
                    "for each run. They hold times, node types and versions, no prompts and no file names.",
                ),
                theme_input(),
            ],
            outputs=[
                io.Image.Output(display_name="chart", tooltip="The chart as a picture, 900 pixels wide."),
                io.String.Output(display_name="report", tooltip="The advice and the table as text."),
                io.Image.Output(display_name="image", tooltip="The same picture that came in."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs):
        """Begins the measurement, as the logger does. Never equal to itself: each run has a report of its own."""
        _begin()
        return float("nan")

    @classmethod
    def execute(cls, image, export="off", theme="dark") -> io.NodeOutput:
        check_choice("export", export, EXPORTS)
        check_choice("theme", theme, THEMES)
        run, context = ensure_run(), get_executing_context()
        if run is None or context is None:
            chart = as_image(note_picture(NOT_MEASURED))
            return io.NodeOutput(chart, NOT_MEASURED, image, ui=ui.PreviewText(NOT_MEASURED))
        record = so_far(run, context.node_id)
        earlier = earlier_runs(record, EARLIER_RUNS)
        advice = perf.advise(record, earlier[0] if earlier else None)
        shown = [advice.sentence, *_exported(record, advice, EXPORTS[export])]
        try:
            from ..qwen_edit.perf.chart import draw_report

            chart = as_image(draw_report(record, earlier, advice, theme))
        except ImportError:
            chart = as_image(note_picture(NO_MATPLOTLIB))
            shown.append(NO_MATPLOTLIB)
        table = perf.report_table(record, earlier, advice)
        on_node = ui.PreviewImage(chart, cls=cls).as_dict() | ui.PreviewText("\n".join(shown)).as_dict()
        return io.NodeOutput(chart, table, image, ui=on_node)


def _exported(record: dict, advice: perf.Advice, endings: tuple[str, ...]) -> list[str]:
    """Lines that say where the files are, or why there are none: a full disk must not cost the picture."""
    folder = Path(folder_paths.get_output_directory()) / NAME
    started = datetime.datetime.fromisoformat(record["time"])
    lines = []
    for ending in endings:
        run = safe_name(record["prompt_id"][:8])  # a client may choose it
        path = folder / f"report_{started:%Y%m%d_%H%M%S}_{run}.{ending}"
        try:
            perf.write_whole(path, perf.as_json(record, advice) if ending == "json" else perf.as_csv(record))
            lines.append(f"Written: {NAME}/{path.name}")
        except OSError as error:
            lines.append(f"Not written: {NAME}/{path.name} ({error.strerror}).")
    return lines
