"""Which stage a node belongs to, and the table people read."""

STAGES = ("load", "lora", "preprocess", "denoise", "decode", "postprocess", "save", "other", "report", "host")

_BY_CLASS = {
    "load": (
        "QwenEditLoader QwenEditAccelerate UNETLoader CLIPLoader DualCLIPLoader VAELoader CheckpointLoader "
        "CheckpointLoaderSimple DiffusersLoader UpscaleModelLoader UnetLoaderGGUF CLIPLoaderGGUF "
        "NunchakuQwenImageDiTLoader"
    ),
    "lora": "QwenEditLoraSwitch LoraLoader LoraLoaderModelOnly LoraLoaderBypass LoraLoaderBypassModelOnly",
    "preprocess": (
        "QwenEditSmartResize QwenEditEncode LoadImage LoadImageMask LoadImageOutput ImageScale ImageScaleBy "
        "ImageScaleToTotalPixels ImageCrop ImagePadForOutpaint FluxKontextImageScale CLIPTextEncode "
        "TextEncodeQwenImageEdit TextEncodeQwenImageEditPlus VAEEncode VAEEncodeTiled EmptyLatentImage "
        "EmptySD3LatentImage EmptyQwenImageLayeredLatentImage ConditioningZeroOut ReferenceLatent"
    ),
    "denoise": (
        "QwenEditSampler QwenEditStepSweep QwenEditBatch KSampler KSamplerAdvanced SamplerCustom SamplerCustomAdvanced "
        "QwenEditStepPreset ModelSamplingAuraFlow CFGNorm BasicScheduler BasicGuider CFGGuider KSamplerSelect RandomNoise"
    ),
    "decode": "VAEDecode VAEDecodeTiled",
    "postprocess": "QwenEditRestoreSize ImageUpscaleWithModel ImageCompositeMasked",
    "report": "QwenEditPerfReport",
    "save": "QwenEditSave SaveImage PreviewImage SaveImageWebsocket SaveAnimatedWEBP SaveAnimatedPNG",
}
_STAGE_BY_CLASS = {class_type: name for name, classes in _BY_CLASS.items() for class_type in classes.split()}


def stage_of(class_type: str) -> str:
    """The stage a ComfyUI node type belongs to; "other" for types that are not listed."""
    return _STAGE_BY_CLASS.get(class_type, "other")


def stage_table(record: dict) -> str:
    """A record as plain text: a row per stage with its time and share, then steps and memory."""
    stages = record["stages"]
    names = [name for name in STAGES if name in stages] + [name for name in stages if name not in STAGES]
    rows = [("stage", "ms", "share", "device ms")]
    for name in names:
        entry = stages[name]
        rows.append((name, f"{entry['ms']:.1f}", f"{entry['share']:.1%}", _number(entry["device_ms"])))
    rows.append(("total", f"{record['wall_ms']:.1f}", "100.0%", ""))
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {ms:>10}  {share:>7}  {device:>10}".rstrip() for name, ms, share, device in rows]
    for node in record["nodes"] + record["spans"]:
        steps = node.get("steps")
        if steps and node["stage"] == "denoise":
            values = steps["device_ms"] or steps["ms"] or [steps["first_ms"] or 0.0]
            clock = "device" if steps["device_ms"] else "wall"
            median = sorted(values)[len(values) // 2]
            lines.append(f"{node['class_type'] or 'denoise'}: {steps['count']} steps, {median:.1f} ms each ({clock})")
    lines.append(_footer(record))
    return "\n".join(lines)


def _footer(record: dict) -> str:
    gib = record["process"]["rss_mib_max"] / 1024
    if record["cold"]:
        parts = [f"{record['status']}, cold (loaded {', '.join(record['models_loaded'])}), process {gib:.2f} GiB"]
    else:
        parts = [f"{record['status']}, warm, process {gib:.2f} GiB"]
    device = record["device"]
    if device.get("peak_mib"):
        parts.append(f"device peak {device['peak_mib'] / 1024:.2f} GiB")
    if device.get("utilisation_mean") is not None:
        parts.append(f"GPU {device['utilisation_mean']:.0f} % busy")
    return "  ".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
