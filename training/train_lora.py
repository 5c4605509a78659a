"""Stage 3: two LoRAs on the trained model, whose weights stay as they are."""

from __future__ import annotations

import time

import torch

from training.export import lora_config
from training.instructions import EXACT, STYLE_PROMPTS
from training.styles import STYLES
from training.text_side import TextSide
from training.tokenizer import TEMPLATE_TOKENS
from training.train_edit import PIXELS_PER_BATCH, Batch, Engine, Maker, channel_weights, flow_loss
from training.train_vae import Replay, learning_rate, make_optimizer, set_rate

PEAK_LEARNING_RATE = 3e-3
SIZES = ((192, 192), (256, 256), (192, 256), (256, 192))
# Share of samples that ask for another edit and get it in the style: the LoRA is a look, not an instruction.
OTHER_EDITS = 0.3


def style_batch(maker: Maker, style: str, scale: float) -> tuple[Batch, list[list[int]]]:
    """Pictures, their styled answers and the prompts: mostly the neutral STYLE_PROMPTS."""
    height, width = maker.random.choice(SIZES)
    count = max(2, int(scale * PIXELS_PER_BATCH / height / width))
    pictures = maker.pool.crops(count, height, width, maker.generator)
    targets, names, prompts = pictures.clone(), ["identity"] * count, []
    for row in range(count):
        if maker.random.random() < OTHER_EDITS:
            names[row] = maker.random.choice([n for n in maker.single if n in EXACT])
            targets[row] = EXACT[names[row]].apply(pictures[row])
            prompts.append(maker.random.choice(maker.tokens[names[row]]))
        elif maker.random.random() < 0.1:
            prompts.append(maker.nothing)
        else:
            prompts.append(maker.random.choice(maker.style_tokens))
    return maker._finish(names, STYLES[style](targets), [pictures]), prompts


def train_lora(
    engine: Engine,
    text: TextSide,
    maker: Maker,
    statistics: dict,
    style: str,
    seconds: float,
    seed: int,
    scale: float = 0.5,
) -> dict:
    """Leave the trained adapter "default" on the transformer."""
    device = engine.device
    torch.manual_seed(seed)
    typed = {spelled for p in STYLE_PROMPTS for spelled in (p, p + ".", p.capitalize(), "please " + p)}
    maker.style_tokens = [text.tokenize(p) for p in sorted(typed)]
    text.encoder.requires_grad_(False)
    engine.transformer.requires_grad_(False)
    engine.transformer.add_adapter(lora_config(), adapter_name="default")
    parameters = [p for p in engine.transformer.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = make_optimizer(parameters, device, 0.0)
    weights = channel_weights(statistics, device)
    longest = max(len(ids) for group in maker.tokens.values() for ids in group)
    grids: list = []

    def step_on(target, references, ids, mask, *vision) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            with torch.no_grad():
                embeddings = text.embed(ids, list(vision))
            mask = mask[:, TEMPLATE_TOKENS:]
            loss = flow_loss(engine, target, references, grids, embeddings, mask, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    replay = Replay(step_on, device)
    step, running = 0, None
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        set_rate(optimizer, learning_rate(elapsed / seconds, PEAK_LEARNING_RATE, 0.05))
        if step % 2 == 0:
            batch, prompts = style_batch(maker, style, scale)
            grids[:] = batch.grids
        ids, mask = text.ids(prompts, batch.vision, longest)
        loss = replay(tuple(grids), batch.target, batch.references, ids, mask, *batch.vision)
        running = loss.clone() if running is None else running.lerp(loss, 0.05)
        step += 1
        if step % 25 == 0:
            float(running)  # keeps the device's queue short, so that the clock is true
    return {"steps": step, "seconds": round(time.perf_counter() - begin, 1), "loss": round(float(running), 5)}
