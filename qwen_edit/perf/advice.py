"""One line on what slows a run down and what to try, from the record alone.

Each rule looks at recorded facts and says what share of the wall time its remedy could save at most; the rule that
saves most speaks. Texts are templates because the panel in the browser shows them in its own language
(`locales/*/main.json` holds the same keys).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

TEXTS = {
    "error": "The run ended early ({status}); the times below go up to there.",
    "cached": "Nothing was sampled: there is no sampler in the graph, or ComfyUI answered from its cache. Then change the seed.",
    "loading_again": "{share} of the time went into loading models, as in the run before: they don't stay in memory. "
    "Try profile fast or small, or fewer models in one workflow.",
    "loading": "{share} of the time ({seconds}) went into loading models, which a first run pays. Run again for the warm time.",
    "first_step": "The first step took {first} and the others {median} each: loading and warming up, which later runs don't pay.",
    "streaming": "Blocks of the model that don't fit the card are streamed over the bus in every step. Try profile fast "
    "or small, or a smaller file.",
    "attention": "The attention you chose doesn't run on this card; {attention} is used instead. Try attention auto.",
    "native_forward": "ComfyUI's own forward of Qwen-Image ran. Qwen Edit Accelerate before the sampler takes a third off each step, "
    "with fp8 files half; Extensions → Qwen Edit Fast → Accelerate this workflow puts it there.",
    "cpu": "Everything ran on the CPU: {share} of the time is denoising, which a graphics card does many times as fast.",
    "many_steps": "{steps} steps take {share} of the time. Step Sweep shows what {fewer} would look like.",
    "guidance": "Guidance (CFG {cfg}) runs the model twice in each of {steps} steps. Lightning 8, with its LoRA, runs it "
    "8 times in all; Step Sweep shows the difference.",
    "encoding": "{share} of the time went into preparing pictures and text. It is kept while prompt and pictures stay: "
    "change seed and preset only, and later runs save it.",
    "native_encoding": "{share} of the time went into ComfyUI's encoding of pictures and text. Qwen Edit Encode makes positive and negative "
    "in one go, with the CLIP and VAE of Qwen Edit Loader in a fifth of the time.",
    "decoding": "{share} of the time went into the VAE's decoding. A smaller picture decodes faster.",
    "saving": "{share} of the time ({seconds}) went into saving. PNG is slow to write: Qwen Edit Save writes the same pixels as "
    "lossless WebP in a third of the time.",
    "saving_much": "{share} of the time ({seconds}) went into saving. Save fewer or smaller pictures, or preview instead.",
    "host": "{share} of the time went by between the nodes, in ComfyUI. Look for other programs that use the processor.",
    "idle_card": "The card was busy {busy} of the time while denoising took {share}: the processor can't keep up. "
    "Close what else uses it.",
    "fine": "Nothing stands out: denoising is {share} of the time, {median} for each step, and that is the card's own pace.",
}

WARM_UP_TIMES = 3.0  # a first step longer than this many others holds more than a step
LEAST = 0.1  # a remedy that saves less of the wall time is not worth a sentence
STANDARD_STEPS = 40
LIGHTNING_STEPS = 8
SAVED_BY_WEBP = 0.65  # of Save Image's time (benchmarks/saving.py)


@dataclass(frozen=True)
class Advice:
    """`code` is a key of `TEXTS`, `values` fill its template, `saves` is the share of wall time that could go."""

    code: str
    values: dict[str, str]
    saves: float

    @property
    def sentence(self) -> str:
        return TEXTS[self.code].format(**self.values)


def advise(record: dict, before: dict | None = None) -> Advice:
    """What to try first.

    Args:
        before: the previous run of the same graph, if there was one.
    """
    if record["status"] in ("error", "interrupted"):
        return Advice("error", {"status": record["status"]}, 0.0)
    if _share(record, "denoise") == 0:
        return Advice("cached", {}, 0.0)
    found = [advice for rule in RULES for advice in rule(record, before) if advice.saves >= LEAST]
    if found:
        return max(found, key=lambda advice: advice.saves)
    first, median, _ = _steps(record)
    return Advice("fine", {"share": _percent(_share(record, "denoise")), "median": _time(median or first)}, 0.0)


Rule = Callable[[dict, dict | None], Iterator[Advice]]


def _loading(record: dict, before: dict | None) -> Iterator[Advice]:
    share = _share(record, "load")
    again = before is not None and before["cold"] and record["cold"] and _share(before, "load") >= LEAST
    seconds = _time(record["stages"].get("load", {"ms": 0.0})["ms"])
    yield Advice("loading_again" if again else "loading", {"share": _percent(share), "seconds": seconds}, share)


def _first_step(record: dict, before: dict | None) -> Iterator[Advice]:
    first, median, _ = _steps(record)
    if median and first > WARM_UP_TIMES * median:
        yield Advice(
            "first_step", {"first": _time(first), "median": _time(median)}, (first - median) / record["wall_ms"]
        )


def _model(record: dict, before: dict | None) -> Iterator[Advice]:
    facts = record.get("facts", {})
    share = _share(record, "denoise")
    if facts.get("streamed"):
        # Not measured apart from the products that run beside it. More than guidance's half: nothing else helps before it.
        yield Advice("streaming", {}, share * 0.6)
    if facts.get("attention_fell_back"):
        # Attention is about half of a forward on the card, and the slowest kernel takes about twice the fastest's time
        # (README, forward.py --profile and its ceilings).
        yield Advice("attention", {"attention": str(facts["attention"])}, share * 0.25)
    if _is_unaccelerated(record):
        yield Advice("native_forward", {}, share * 0.47)  # README: 350 ms -> 187 in fp8, 405 -> 258 in bf16


def _card(record: dict, before: dict | None) -> Iterator[Advice]:
    share, device = _share(record, "denoise"), record["device"]
    if device["name"] == "cpu":
        yield Advice("cpu", {"share": _percent(share)}, share * 0.9)  # any card is ten times as fast or more
    busy = device.get("utilisation_mean")
    if busy is not None and share >= 0.5:
        yield Advice("idle_card", {"busy": f"{busy:.0f} %", "share": _percent(share)}, share - busy / 100)


def _recipe(record: dict, before: dict | None) -> Iterator[Advice]:
    if _is_unaccelerated(record):
        return  # first what leaves the picture as it is
    share = _share(record, "denoise")
    facts = record.get("facts", {})
    steps = min(_steps(record)[2], facts.get("steps", math.inf))  # of one edit; a batch takes as many for each
    cfg = facts.get("true_cfg_scale", 1)
    if steps > STANDARD_STEPS:
        values = {"steps": str(steps), "share": _percent(share), "fewer": str(STANDARD_STEPS)}
        yield Advice("many_steps", values, share * (1 - STANDARD_STEPS / steps))
    elif steps > LIGHTNING_STEPS and cfg > 1:
        # What guidance itself costs; that Lightning also needs fewer steps is left out, because it changes the picture.
        yield Advice("guidance", {"cfg": f"{cfg:g}", "steps": str(steps)}, share * 0.5)


def _around(record: dict, before: dict | None) -> Iterator[Advice]:
    encoding = "native_encoding" if record.get("facts", {}).get("native_encoding") else "encoding"
    stages = {encoding: "preprocess", "decoding": "decode", "host": "host"}
    for code, stage in stages.items():
        share = _share(record, stage)
        seconds = _time(record["stages"].get(stage, {"ms": 0.0})["ms"])
        yield Advice(code, {"share": _percent(share), "seconds": seconds}, share)


def _saving(record: dict, before: dict | None) -> Iterator[Advice]:
    share, save = _share(record, "save"), record["stages"].get("save", {"ms": 0.0})["ms"]
    as_png = sum(node["ms"] for node in record["nodes"] if node["class_type"] == "SaveImage" and not node["cached"])
    part = as_png / max(save, as_png, 1e-3)
    yield Advice("saving", {"share": _percent(share * part), "seconds": _time(as_png)}, share * part * SAVED_BY_WEBP)
    yield Advice("saving_much", {"share": _percent(share), "seconds": _time(save)}, share * (1 - part))


RULES: tuple[Rule, ...] = (_loading, _first_step, _model, _card, _recipe, _around, _saving)


def _is_unaccelerated(record: dict) -> bool:
    """Whether ComfyUI's own forward ran on a card."""
    return bool(record.get("facts", {}).get("native_forward")) and record["device"]["name"] != "cpu"


def _share(record: dict, stage: str) -> float:
    """Of the run without the drawing of its report."""
    ms = {name: entry["ms"] for name, entry in record["stages"].items()}
    return ms.get(stage, 0.0) / max(record["wall_ms"] - ms.get("report", 0.0), 1e-3)


def _steps(record: dict) -> tuple[float, float | None, int]:
    """(first ms, median ms of the others, number) of the denoising that took longest; zeros without one."""
    series = [
        entry for entry in record["nodes"] + record["spans"] if entry["stage"] == "denoise" and entry.get("steps")
    ]
    if not series:
        return 0.0, None, 0
    steps = max(series, key=lambda entry: entry["ms"])["steps"]
    others = sorted(steps["ms"])
    return steps["first_ms"] or 0.0, others[len(others) // 2] if others else None, steps["count"]


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"


def _time(ms: float) -> str:
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms:.0f} ms"
