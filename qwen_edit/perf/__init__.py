"""What one edit cost: wall time per node and stage, device time per step, memory, how busy the machine was.

Code that takes time says so, and pays one comparison when nobody is recording:

    with stage("load"):
        ...
    with stage("denoise"):
        for sigma in sigmas:
            ...
            record_step()

Somebody records by activating a `Run` (ComfyUI's prompts: `nodes/host/perf.py`; plain Python:
`with recording(device) as run`). Times on the device are CUDA events that are recorded in passing and read
after the run, so recording never waits for the device. Nothing here creates a CUDA context.

The record, one JSON object per line of the log:

    format          2
    time            start, ISO 8601, UTC
    prompt_id       ComfyUI's id of the run, or null
    status          "success", "error", "interrupted" or "unknown"
    error           {node_id, class_type, type, code}: exception type and QE_ code, never its text; absent
                    without an error
    wall_ms         start to end
    cold            whether a model was loaded onto its device during this run
    models_loaded   class names of those models
    stages          {name: {ms, share, device_ms}}: time spent in the stage and nowhere deeper. Names: load,
                    lora, preprocess, denoise, decode, postprocess, save, other, report (the drawing of
                    QwenEditPerfReport), and host: the time between nodes. The shares add up to 1. device_ms is null without a CUDA device.
    nodes           [{id, class_type, stage, at_ms, ms, device_ms, cached, peak_mib, inner, steps}] in order of
                    their start, cached ones last
                    inner: {stage: ms} spent in stages that were entered inside the node
                    steps: {count, source, first_ms, ms, device_ms}. source "engine": every step was
                    announced; "progress": taken from the progress bar, where first_ms runs from the start
                    of the node and the later values are averages when the bar skipped some. ms and
                    device_ms hold the steps after the first, at most 200 of them.
    spans           the same for stages entered outside of any node or on another thread (id null), the first
                    1000; work on other threads runs beside the rest and is not part of `stages`
    memory          {at_ms, device_mib, rss_mib}: lists of one length, taken as nodes and steps begin and end;
                    device_mib (torch's allocator) is null without a CUDA device
    graph           a fingerprint of the node types of the prompt, to find runs of the same graph
    facts           what was sampled and how, as far as it is known: {steps, true_cfg_scale, attention,
                    attention_fell_back, precision, streamed, native_encoding, native_forward: by ComfyUI's nodes}
    taps            [{label, node_id, at_ms}] of the logger nodes, in order
    device          {name, total_mib, peak_mib (allocator), used_mib_max, utilisation_mean, utilisation_max
                    (percent, NVML), utilisation_missing (why)}
    process         {cpu_percent (100 is one core), rss_mib_max, ram_used_mib_max, ram_total_mib}
    versions        {torch, python}
    text            {"node id.input": text} of the prompt's text inputs; only when asked for

Absent keys mean that there was nothing to say.
"""

from .advice import Advice, advise
from .export import as_csv, as_json
from .log import append_record, read_records, write_whole
from .monitor import Monitor
from .report import between_nodes_ms, previous_runs, ran, report_table
from .run import Run, activate, active_run, deactivate, record_facts, record_step, recording, stage
from .table import STAGES, stage_of, stage_table

__all__ = [
    "STAGES",
    "Advice",
    "Monitor",
    "Run",
    "activate",
    "active_run",
    "advise",
    "append_record",
    "as_csv",
    "as_json",
    "between_nodes_ms",
    "deactivate",
    "previous_runs",
    "ran",
    "read_records",
    "record_facts",
    "record_step",
    "recording",
    "report_table",
    "stage",
    "stage_of",
    "stage_table",
    "write_whole",
]
