"""The performance logger: a tap anywhere in the graph that has the whole prompt measured."""

import logging

from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context

from ..qwen_edit.perf import stage_table
from .host.perf import ensure_run

MAX_LABEL = 200


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
        try:
            ensure_run()
        except Exception:
            logging.warning("Qwen Edit Fast: this prompt is not measured.", exc_info=True)
        return ""

    @classmethod
    def execute(cls, value, label="", include_text=False) -> io.NodeOutput:
        run = ensure_run()
        if run is None:
            return io.NodeOutput(value, ui=ui.PreviewText("Not measured: ComfyUI's queue is not running this."))
        context = get_executing_context()
        run.tap(label[:MAX_LABEL], context.node_id if context else None)
        return io.NodeOutput(value, ui=ui.PreviewText(stage_table(run.record("so far", wait=False))))
