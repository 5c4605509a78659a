"""Stage 1b: the language side learns to tell the instructions apart before the transformer listens to it.

Without it the transformer saw nearly the same embeddings for every prompt for thousands of steps and learned
averages of edits. A linear head (not shipped) classifies the hidden state of a prompt's last token; every
token after the user's text sees all of it, so these tokens then carry the instruction. The same loss goes on,
weighted, in stage 2.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from training.instructions import EXACT, OPEN
from training.text_side import TextSide
from training.train_vae import learning_rate, make_optimizer, set_rate

NAMES = [*EXACT, *OPEN]
PEAK_LEARNING_RATE = 2e-3


class InstructionHead(torch.nn.Module):
    """Which instruction, or none (the last class, the negative prompt), from the last token of a prompt."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = torch.nn.Linear(width, len(NAMES) + 1)

    def loss(self, embeddings: torch.Tensor, mask: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """embeddings `[B, L, width]`, mask `[B, L]`, classes `[B]`."""
        return F.cross_entropy(self.logits(embeddings, mask), classes)

    def logits(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        last = (mask.sum(1) - 1)[:, None, None].expand(-1, 1, embeddings.shape[2])
        return self.linear(embeddings.gather(1, last)[:, 0]).float()


def fake_vision(text: TextSide, count: int, pictures: int) -> list[torch.Tensor]:
    """Noise of the shape of square pictures: the words matter here."""
    side = 7 * text.factor
    return [torch.randn(1, 3, side, side, device=text.device).expand(count, -1, -1, -1) for _ in range(pictures)]


def train_text(text: TextSide, maker, head: InstructionHead, seconds: float, seed: int, batch: int = 128) -> dict:
    torch.manual_seed(seed)
    parameters = [*text.language.parameters(), *head.parameters()]
    optimizer = make_optimizer(parameters, text.device, 1e-2)
    step, running = 0, None
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        set_rate(optimizer, learning_rate(elapsed / seconds, PEAK_LEARNING_RATE, 0.1))
        pictures = 2 if maker.random.random() < 0.2 else 1
        names = maker.random.choices(maker.double if pictures == 2 else maker.single, k=batch)
        prompts, classes = maker.prompts_of(names)
        vision = fake_vision(text, 1, pictures)
        with torch.autocast(text.device.type, torch.bfloat16, enabled=text.device.type == "cuda"):
            ids, mask = text.ids(prompts, vision)
            embeddings = text.embed(ids, [v.expand(batch, -1, -1, -1) for v in vision])
            loss = head.loss(embeddings, mask[:, -embeddings.shape[1] :], classes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        running = float(loss.detach()) if running is None else 0.9 * running + 0.1 * float(loss.detach())
        step += 1
    accuracy, missed = held_out_accuracy(text, head)
    return {
        "steps": step,
        "seconds": round(time.perf_counter() - begin, 1),
        "loss": round(running, 4),
        "held_out_phrasings_recognised": round(accuracy, 3),
        "missed": missed,
    }


@torch.no_grad()
def held_out_accuracy(text: TextSide, head: InstructionHead) -> tuple[float, list[str]]:
    """Share of the phrasings never trained on that the head recognises, and those it does not."""
    right, total, missed = 0, 0, []
    for index, instruction in enumerate((*EXACT.values(), *OPEN.values())):
        vision = fake_vision(text, len(instruction.held_out), instruction.pictures)
        embeddings, mask = text.encode([text.tokenize(p) for p in instruction.held_out], vision)
        guesses = head.logits(embeddings.float(), mask).argmax(1).tolist()
        for prompt, guess in zip(instruction.held_out, guesses, strict=True):
            total += 1
            right += guess == index
            if guess != index:
                missed.append(f"{prompt} -> {[*NAMES, 'none'][guess]}")
    return right / total, missed
