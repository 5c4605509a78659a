"""What Qwen Edit Reference Cache buys and what it costs.

    python benchmarks/reference_cache.py [--steps 4,8,20,40] [--tolerances 0.05,0.1,0.2] [--photographs 3]
    python benchmarks/reference_cache.py --full-size [--references 1,2,3] [--forms bf16,fp8]

Without ``--full-size``: the demo model in diffusers' pipeline, float32. PSNR of each picture against the one without the
cache of the same seed, on photographs that the model never saw; "reused" is the share of forwards that took the references from an
earlier one. 4 and 8 steps run without guidance, the others with the preset standard's. ``--every`` adds the plain rule, a forward of every so many.
With it: milliseconds of one forward with random weights, medians: without the cache, one that leaves the references in it, and one
that takes them from it; and what the cache takes on the card for one conditioning (guidance has two).
"""

import argparse
import gc
import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from environment import environment, keep
from forward import Case, milliseconds, ours, random_model
from quantization import DEMO, INSTRUCTIONS, Transformer, demo_transformer, edit

from qwen_edit.reference_cache import ReferenceCache
from qwen_edit.transformer import QwenEditTransformer
from training.data import HELD_OUT, held_out_photograph
from training.instructions import EXACT, OPEN, psnr
from training.pipeline import load_reference_pipeline


class Cached(Transformer):
    """With a cache for each conditioning, which the pipeline hands over as the same tensor at each step."""

    tolerance: float | None = None
    every: int | None = None

    def start(self) -> None:
        self.caches: dict[int, tuple[ReferenceCache, list[float]]] = {}
        self.forwards = self.reused = 0

    def forward(self, hidden_states, encoder_hidden_states, timestep, **arguments):  # pyright: ignore
        self.references = None
        if self.tolerance is not None or self.every is not None:
            cache, seen = self.caches.setdefault(encoder_hidden_states.data_ptr(), (ReferenceCache(), []))
            if self.tolerance is not None:
                cache.renew(timestep[0].item(), self.tolerance)
            elif len(seen) % (self.every or 1) == 0:
                cache.begin()
            seen.append(0.0)
            self.forwards += 1
            self.reused += cache.complete
            self.references = cache
        return super().forward(hidden_states, encoder_hidden_states, timestep=timestep, **arguments)


def pictures(options, device: torch.device) -> list[dict[str, Any]]:
    pipeline = load_reference_pipeline(DEMO, device=device)
    transformer: Any = demo_transformer(None, device, torch.float32)
    transformer.__class__ = Cached
    pipeline.transformer = transformer
    cases = [(name, photograph) for name in options.instructions for photograph in HELD_OUT[: options.photographs]]
    rules: list[tuple[str, float | None, int | None]] = [(f"tolerance {t:g}", t, None) for t in options.tolerances]
    rules += [(f"every {n}", None, n) for n in options.every]
    rows = []
    for steps in options.steps:
        settings = Namespace(side=options.side, steps=steps, scale=1.0 if steps <= 8 else 4.0, seed=0)

        def run(settings=settings) -> dict[tuple[str, str], Any]:
            transformer.start()
            found = {}
            for name, photograph in cases:
                transformer.caches.clear()
                source = held_out_photograph(photograph, options.side, options.side)
                found[name, photograph] = edit(pipeline, source, (EXACT | OPEN)[name].prompts[0], settings)
            return found

        transformer.tolerance = transformer.every = None
        expected = run()
        for rule, transformer.tolerance, transformer.every in rules:
            found = {case: psnr(picture, expected[case]) for case, picture in run().items()}
            row = {
                "steps": steps,
                "rule": rule,
                "reused": round(transformer.reused / transformer.forwards, 3),
                "median dB": round(statistics.median(found.values()), 1),
                "minimum dB": round(min(found.values()), 1),
                "of": " ".join(min(found, key=lambda case: found[case])),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def full_size(options, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    source = random_model(options.layers, device)
    for form in options.forms:
        model = ours(source, None if form == "bf16" else form, "auto")
        for count in options.references:
            rows.append({"form": form, "references": count} | timed(model, count, options, device))
            print(rows[-1], flush=True)
        del model
        gc.collect()
    return rows


def timed(model: QwenEditTransformer, count: int, options, device: torch.device) -> dict[str, Any]:
    case = WithReferences(Case(options.side, options.text, device), count)
    cache = ReferenceCache()

    def leaves() -> None:
        cache.begin()
        case.forward(model, cache)

    def ms(call) -> float:
        return round(milliseconds(call, device, options.repeat), 1)

    row = {
        "without, ms": ms(lambda: case.forward(model)),
        "leaves them, ms": ms(leaves),
        "takes them, ms": ms(lambda: case.forward(model, cache)),
        "GiB": round(sum(block.nbytes for block in cache.blocks) / 2**30, 2),
    }
    exact, again = case.forward(model).double(), case.forward(model, cache).double()
    return row | {"error of the same step": float(f"{((again - exact).norm() / exact.norm()).item():.2g}")}


class WithReferences:
    """``Case`` with several references of the output's size."""

    def __init__(self, case: Case, count: int):
        self.case = case
        tokens = [case.tokens(case.latents), *[case.tokens(case.reference)] * count]
        self.latents = torch.cat(tokens, dim=1)
        self.shapes = [[(1, case.rows, case.rows)] * (count + 1)]

    def forward(self, model: QwenEditTransformer, cache: ReferenceCache | None = None) -> torch.Tensor:
        model.references = cache
        return model(self.latents, self.case.text, None, self.case.known_timestep, self.shapes, return_dict=False)[0]


def numbers(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",") if part]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=numbers(int), default=[4, 8, 20, 40])
    parser.add_argument("--tolerances", type=numbers(float), default=[0.05, 0.1, 0.2])
    parser.add_argument("--every", type=numbers(int), default=[])
    parser.add_argument("--photographs", type=int, default=len(HELD_OUT))
    parser.add_argument("--instructions", type=numbers(str), default=INSTRUCTIONS.split(","))
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--side", type=int, help="pixels; default 128, with --full-size 1024")
    parser.add_argument("--text", type=int, default=280, help="text tokens")
    parser.add_argument("--references", type=numbers(int), default=[1, 2, 3])
    parser.add_argument("--forms", type=numbers(str), default=["bf16", "fp8"])
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--name", help="of the result file")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    options.side = options.side or (1024 if options.full_size else 128)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = full_size(options, device) if options.full_size else pictures(options, device)
    name = options.name or f"reference_cache_{'full_size_' if options.full_size else ''}{device.type}"
    result = {"benchmark": "reference_cache", "environment": environment(), "side": options.side, "rows": rows}
    print(f"Wrote {keep(name, result, options.results)}")


if __name__ == "__main__":
    main()
