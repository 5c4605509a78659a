"""Measures a model folder on the held-out photographs: `python -m training.evaluate --folder demo_model`.

For every instruction with one exact answer: dB against that answer, and dB of the other instructions' results
against it (what a model that ignores the words would get). Prints JSON. The sampler is the pipeline's Euler
loop, in batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch

from training.data import HELD_OUT, held_out_photograph
from training.flat_vae import from_diffusers
from training.instructions import EXACT, psnr
from training.text_side import TextSide
from training.train_edit import Engine, Latents, sample

# (steps, true_cfg_scale): the Lightning-like, the draft and the standard preset
SETTINGS = ((4, 1.0), (20, 3.0), (40, 4.0))


@torch.no_grad()
def evaluate(engine: Engine, text: TextSide, latents: Latents, side: int = 256, settings=SETTINGS) -> dict:
    """dB per instruction, setting and photograph at side × side; the wrong-instruction table at the first
    setting.
    """
    photographs = np.stack([held_out_photograph(name, side, side) for name in HELD_OUT])
    tensor = torch.from_numpy(photographs).to(engine.device).float() / 255
    count = len(tensor)
    table: dict = {name: {} for name in EXACT}
    for pictures in (1, 2):
        group = [i for i in EXACT.values() if i.pictures == pictures]
        sources = [tensor, tensor.roll(1, 0)][:pictures]
        answers = [i.apply(*sources).cpu().numpy() for i in group]
        runs = [(f"{s} steps, cfg {c:g}", s, c, 0, "prompts") for s, c in settings]
        runs += [("held-out phrasings", *settings[0], k, "held_out") for k in range(2)]
        for label, steps, scale, which, kind in runs:
            prompts = [getattr(i, kind)[which] for i in group for _ in range(count)]
            joined = [s.repeat(len(group), 1, 1, 1) for s in sources]
            made = sample(engine, text, latents, prompts, joined, steps, scale).cpu().numpy()
            made = made.reshape(len(group), count, *made.shape[1:])
            for index, instruction in enumerate(group):
                decibels = [round(psnr(made[index, p], answers[index][p]), 2) for p in range(count)]
                table[instruction.name].setdefault(label, []).extend(decibels)
                if label.endswith(f"cfg {settings[0][1]:g}") and steps == settings[0][0]:
                    others = [
                        psnr(made[other, p], answers[index][p])
                        for other in range(len(group))
                        for p in range(count)
                        if other != index
                    ]
                    table[instruction.name]["wrong instruction"] = round(statistics.median(others), 2)
    medians = {}
    for label in next(iter(table.values())):
        values = [row[label] for row in table.values()]
        flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
        medians[label] = round(statistics.median(flat), 2)
    return {"photographs": HELD_OUT, "side": side, "median_db": medians, "instructions": table}


def main() -> None:
    from training.pipeline import load_reference_pipeline

    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "demo_model")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="the first setting only")
    options = parser.parse_args()
    device = torch.device(options.device)
    pipeline = load_reference_pipeline(options.folder, device=device)
    backend = pipeline.tokenizer.backend_tokenizer
    text = TextSide(pipeline.text_encoder, lambda words: backend.encode(words, add_special_tokens=False).ids, device)
    config = pipeline.vae.config
    numbers = {"mean": config.latents_mean, "std": config.latents_std}
    latents = Latents(from_diffusers(pipeline.vae).to(device), numbers, device)
    settings = SETTINGS[:1] if options.fast else SETTINGS
    engine = Engine(pipeline.transformer, device)
    print(json.dumps(evaluate(engine, text, latents, options.side, settings), indent=1))


if __name__ == "__main__":
    main()
