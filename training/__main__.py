"""Train the demo model: `python -m training --out WORK --folder demo_model`.

Stages (VAE, edit, LoRAs) have time limits in seconds; after each its weights (bf16), its log and a contact
sheet lie in `--out`, so that a later failure loses nothing. `--resume DIR` starts from such a folder: a stage
with 0 seconds is taken from there, another continues from there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2Tokenizer

from training import export
from training.data import HELD_OUT, build_pool, held_out_photograph
from training.evaluate import evaluate
from training.flat_vae import FlatVAE, from_diffusers, to_diffusers
from training.instructions import EXACT, OPEN, STYLE_PROMPTS, psnr
from training.models import TEXT_WIDTH, build_scheduler, build_text_encoder, build_transformer, build_vae
from training.styles import STYLES
from training.text_side import TextSide
from training.train_edit import Engine, Latents, Maker, initialise, sample, train_edit
from training.train_lora import train_lora
from training.train_text import InstructionHead, held_out_accuracy, train_text
from training.train_vae import evaluate_vae, latent_statistics, train_vae, whiten

ROOT = Path(__file__).parents[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where weights, logs and sheets go")
    parser.add_argument("--folder", type=Path, help="write the finished diffusers folder here")
    parser.add_argument("--resume", type=Path, help="an earlier --out")
    parser.add_argument("--continue-edit", action="store_true", help="begin stage 2 with the weights in --resume")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "demo_model" / "tokenizer")
    parser.add_argument("--vocabulary", type=Path, help="Qwen2.5's vocab.json and merges.txt, to prune anew")
    parser.add_argument("--vae-seconds", type=float, default=300)
    parser.add_argument("--text-seconds", type=float, default=12, help="before stage 2")
    parser.add_argument("--edit-seconds", type=float, default=440)
    parser.add_argument("--lora-seconds", type=float, default=25, help="each")
    parser.add_argument("--seed", type=int, default=2511)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny batches and pool, to try the code on a CPU")
    return parser.parse_args()


def half(state: dict, dtype: torch.dtype = torch.bfloat16) -> dict:
    return {k: v.detach().to("cpu", dtype).contiguous().clone() for k, v in state.items()}


class Run:
    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        self.out = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.begin = time.perf_counter()
        self.log: dict = {
            "date": datetime.date.today().isoformat(),
            "seed": options.seed,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "torch": torch.__version__,
        }
        if options.resume:
            earlier = json.loads((options.resume / "log.json").read_text())
            self.log = {**earlier, **self.log, "earlier": earlier}
        torch.manual_seed(options.seed)
        if options.vocabulary:
            from training.tokenizer import build_tokenizer

            self.tokenizer = build_tokenizer(options.vocabulary)
        else:
            self.tokenizer = Qwen2Tokenizer.from_pretrained(str(options.tokenizer))
        self.vae, self.transformer = build_vae(), build_transformer()
        self.text_encoder = build_text_encoder(self.tokenizer)
        initialise(self.transformer)
        self.flat = FlatVAE(dict(self.vae.config)).to(self.device)
        if options.resume:
            self.vae.load_state_dict({k: v.float() for k, v in load_file(options.resume / "vae.safetensors").items()})
            self.flat = from_diffusers(self.vae).to(self.device)
        trained = options.resume and (options.continue_edit or options.edit_seconds == 0)
        if trained and (options.resume / "transformer.safetensors").exists():
            for name, module in (("transformer", self.transformer), ("text_encoder", self.text_encoder)):
                state = {k: v.float() for k, v in load_file(options.resume / f"{name}.safetensors").items()}
                missing, unexpected = module.load_state_dict(state, strict=False)
                assert not unexpected, unexpected
                assert set(missing) <= {"lm_head.weight"}, missing

    def say(self, *words) -> None:
        print(f"[{time.perf_counter() - self.begin:6.1f} s]", *words, flush=True)

    def save_log(self) -> None:
        self.log["total_seconds"] = round(time.perf_counter() - self.begin, 1)
        (self.out / "log.json").write_text(json.dumps(self.log, indent=1) + "\n")

    def vae_stage(self) -> None:
        seconds, small = self.options.vae_seconds, self.options.small
        if seconds > 0:
            batch = 4 if small else 48
            if self.options.resume:
                whiten(self.flat, self.pool, self.options.seed)
            self.log["vae"] = train_vae(
                self.flat, self.pool, seconds, self.options.seed, batch, bool(self.options.resume)
            )
            whiten(self.flat, self.pool, self.options.seed)
        to_diffusers(self.flat, self.vae)
        # float16: the last encoder layer magnifies small differences, which bf16's 8 bits blur
        state = half(self.vae.state_dict(), torch.float16)
        # everything after this sees the weights that ship
        self.vae.load_state_dict({k: v.float() for k, v in state.items()})
        self.flat = from_diffusers(self.vae).to(self.device).requires_grad_(False)
        decibels, sheet = evaluate_vae(self.flat, *((64, 64) if small else (256, 256)))
        self.log["vae_db"] = decibels
        if seconds > 0 or "statistics" not in self.log:
            self.log["statistics"] = latent_statistics(self.flat, self.pool, self.options.seed + 1)
        save_file(state, str(self.out / "vae.safetensors"))
        Image.fromarray(sheet).save(self.out / "sheet_vae.png")
        self.save_log()
        self.say("vae", {k: round(v, 2) for k, v in decibels.items()}, self.log["statistics"]["preview_db"])

    def edit_stage(self) -> None:
        options = self.options
        self.transformer.to(self.device)
        self.text_encoder.to(self.device)
        backend = self.tokenizer.backend_tokenizer
        self.text = TextSide(
            self.text_encoder, lambda words: backend.encode(words, add_special_tokens=False).ids, self.device
        )
        self.engine = Engine(self.transformer, self.device)
        self.latents = Latents(self.flat, self.log["statistics"], self.device)
        self.maker = Maker(self.pool, self.latents, self.text, options.seed + 2)
        if options.edit_seconds > 0:
            head = InstructionHead(TEXT_WIDTH).to(self.device)
            if options.resume and (options.resume / "head.safetensors").exists():
                head.load_state_dict(load_file(options.resume / "head.safetensors"))
                self.log["text"] = {"held_out_before_stage_2": held_out_accuracy(self.text, head)}
            if options.text_seconds > 0:
                seed, batch = options.seed + 6, 8 if options.small else 128
                self.log["text"] = train_text(self.text, self.maker, head, options.text_seconds, seed, batch)
            self.say("text", self.log["text"])
            scale = 0.02 if options.small else 1.0
            seconds, seed = options.edit_seconds, options.seed + 3
            self.log["edit"] = train_edit(
                self.engine, self.text, self.maker, head, self.log["statistics"], seconds, seed, scale
            )
            self.log["text"]["held_out_after_stage_2"] = held_out_accuracy(self.text, head)
        for name, module in (("transformer", self.transformer), ("text_encoder", self.text_encoder)):
            state = half(module.state_dict())
            state.pop("lm_head.weight", None)  # tied to the embedding
            save_file(state, str(self.out / f"{name}.safetensors"))
            module.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
        self.save_log()
        self.say("edit trained", {k: v for k, v in self.log["edit"].items() if k != "log"})

    def photographs(self) -> torch.Tensor:
        side = 64 if self.options.small else 256
        pictures = [held_out_photograph(name, side, side) for name in HELD_OUT]
        return torch.from_numpy(np.stack(pictures)).to(self.device).float() / 255

    @torch.no_grad()
    def check_edits(self) -> None:
        """A quick look in batches; `training.evaluate` measures with the real pipeline."""
        photographs = self.photographs()
        rng = np.random.default_rng(0)
        table: dict = {}
        rows = [photographs]
        for count in (1, 2):
            group = [i for i in (*EXACT.values(), *OPEN.values()) if i.pictures == count]
            sources, answers = [[] for _ in range(count)], []
            for instruction in group:
                pictures = [photographs, photographs.roll(1, 0)][:count]
                if instruction.name in OPEN:
                    drawn = [instruction.sample(p, rng) for p in photographs]
                    pictures = [torch.stack([d[0] for d in drawn])]
                    answers.append(torch.stack([d[1] for d in drawn]))
                else:
                    answers.append(instruction.apply(*pictures))
                for source, picture in zip(sources, pictures, strict=True):
                    source.append(picture)
            prompts = [i.prompts[0] for i in group for _ in photographs]
            joined = [torch.cat(s) for s in sources]
            for steps, scale in ((4, 1.0), (20, 3.0)):
                result = sample(self.engine, self.text, self.latents, prompts, joined, steps, scale)
                for instruction, made, exact in zip(group, result.split(len(photographs)), answers, strict=True):
                    pairs = zip(made.cpu().numpy(), exact.cpu().numpy(), strict=True)
                    row = table.setdefault(instruction.name, {})
                    row[f"{steps} steps, cfg {scale}"] = [round(psnr(m, e), 2) for m, e in pairs]
                    if steps == 20:
                        rows.append(made)
        for name, row in table.items():
            self.say(f"{name:16}", *row.values())
        self.log["quick_check_db"] = table
        if not self.options.small:
            self.log["evaluation"] = evaluate(self.engine, self.text, self.latents)
            self.say("medians", self.log["evaluation"]["median_db"])
        self.sheet(rows, "sheet_edits.png")
        self.save_log()

    def sheet(self, rows: list[torch.Tensor], name: str) -> None:
        """One row per entry, half size."""
        lines = [torch.cat(list(r), 1)[::2, ::2].cpu().numpy() for r in rows]
        Image.fromarray((np.concatenate(lines).clip(0, 1) * 255).round().astype(np.uint8)).save(self.out / name)

    def lora_stage(self) -> None:
        options = self.options
        photographs = self.photographs()
        rows = [photographs]
        prompts = [STYLE_PROMPTS[0]] * len(photographs)
        for number, (style, function) in enumerate(STYLES.items()):
            target = function(photographs)
            off = sample(self.engine, self.text, self.latents, prompts, [photographs], 20, 1.0)
            seconds, seed = options.lora_seconds, options.seed + 4 + number
            scale = 0.02 if options.small else 0.5
            log = train_lora(self.engine, self.text, self.maker, self.log["statistics"], style, seconds, seed, scale)
            on = sample(self.engine, self.text, self.latents, prompts, [photographs], 20, 1.0)
            for label, result in (("db_on", on), ("db_off", off)):
                pairs = zip(result.cpu().numpy(), target.cpu().numpy(), strict=True)
                log[label] = [round(psnr(a, b), 2) for a, b in pairs]
            export.save_lora(self.transformer, self.out, style)
            self.transformer.unload_lora()
            rows += [target, on]
            self.log.setdefault("lora", {})[style] = log
            self.save_log()
            self.say("lora", style, log)
        self.sheet(rows, "sheet_loras.png")

    def write_folder(self, folder: Path) -> None:
        """The diffusers folder, from the weights in memory."""
        from diffusers import QwenImageEditPlusPipeline

        from training.models import build_processor

        statistics = self.log["statistics"]
        self.vae.register_to_config(
            latents_mean=[round(v, 6) for v in statistics["mean"]],
            latents_std=[round(v, 6) for v in statistics["std"]],
        )
        pipeline = QwenImageEditPlusPipeline(
            scheduler=build_scheduler(),
            vae=self.vae.cpu(),
            text_encoder=self.text_encoder.cpu(),
            tokenizer=self.tokenizer,
            processor=build_processor(self.tokenizer),
            transformer=self.transformer.cpu(),
        )
        export.save_pipeline(pipeline, folder)
        export.save_preview_factors(folder, statistics["factors"], statistics["bias"])
        sources = [self.out] + ([self.options.resume] if self.options.resume else [])
        for style in STYLES:
            name = export.LORA_FILE.format(style)
            found = next((s / name for s in sources if (s / name).exists()), None)
            if found:
                (folder / "loras").mkdir(exist_ok=True)
                (folder / "loras" / name).write_bytes(found.read_bytes())


def main() -> None:
    options = arguments()
    torch.backends.cuda.matmul.allow_tf32 = True
    run = Run(options)
    work = options.vae_seconds + options.edit_seconds + options.lora_seconds
    if work > 0:
        run.pool = build_pool(run.device, options.seed, *((2, 512) if options.small else (384, 512)))
        run.say(f"{len(run.pool.weights)} pictures in the pool")
        run.vae_stage()
        if options.edit_seconds > 0 or options.lora_seconds > 0:
            run.edit_stage()
        if options.lora_seconds > 0:
            run.lora_stage()
    if options.folder:
        run.write_folder(options.folder)
    run.save_log()
    run.say("done")


if __name__ == "__main__":
    main()
