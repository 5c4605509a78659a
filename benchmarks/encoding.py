"""Encoding one edit (two prompts, pictures, reference latents): ComfyUI's own nodes beside QwenEditEncode.

    python benchmarks/random_weights.py FOLDER --comfyui PATH
    python benchmarks/encoding.py --comfyui PATH --models FOLDER [--pictures 1] [--side 1024] [--repeat 10]
    python benchmarks/encoding.py --comfyui PATH --tiny

One process, with DynamicVRAM as ComfyUI starts it. Every edit has new pictures and new prompts. "encode" is all of it: for
ComfyUI two TextEncodeQwenImageEditPlus (positive, negative), for the pack its Encoder, in bf16 as with its own loader
and in fp32 as with the CLIP of another. Milliseconds are medians of wall time, the paths taking turns. "vision",
"language" and "load" (asking ComfyUI for weights) are parts of a few more edits in which the device is waited for around
each part. "ops" counts PyTorch operations of one edit, "error" is that of both conditionings, relative to ComfyUI's.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from environment import environment, keep
from torch.utils._python_dispatch import TorchDispatchMode
from vae import import_comfyui, random_state, wall

NATIVE, BF16, FP32 = "comfyui native", "qwen edit fast, bf16", "qwen edit fast, fp32"
PROMPT = "Replace the {} in picture 1 with a small red balloon and keep everything else as it is."
THINGS = ("cup", "old wooden chair", "lamp post", "white cat", "tree in the background", "sign", "boat")


def start_dynamic_vram(comfyui: Path) -> None:
    """As ComfyUI's ``main.py`` does before its first model."""
    sys.path.insert(0, str(comfyui))
    sys.argv = sys.argv[:1]
    import_module("comfy.cli_args").args.cpu = not torch.cuda.is_available()
    if not torch.cuda.is_available():
        return
    control = import_module("comfy_aimdo.control")
    control.init()
    patchers: Any = import_module("comfy.model_patcher")
    memory: Any = import_module("comfy.memory_management")
    management = import_module("comfy.model_management")
    if not control.init_devices(device.index for device in management.get_all_torch_devices()):
        raise RuntimeError("comfy-aimdo does not run here, and without it ComfyUI would load models in another way.")
    patchers.CoreModelPatcher = patchers.ModelPatcherDynamic
    memory.aimdo_enabled = True


def shrink(llama: Any, qwen_vl: Any) -> dict[str, torch.Tensor]:
    """Make ComfyUI's classes of Qwen2.5-VL small from now on; random weights for them, in bf16."""
    config, vision = llama.Qwen25_7BVLI_Config, qwen_vl.Qwen2VLVisionTransformer
    llama.Qwen25_7BVLI_Config = lambda **_: config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    qwen_vl.Qwen2VLVisionTransformer = lambda hidden_size, **given: vision(
        hidden_size=64, num_heads=4, intermediate_size=64, num_layers=8, **given
    )
    with torch.device("meta"):
        model = llama.Qwen25_7BVLI({}, torch.bfloat16, "meta", import_module("comfy.ops").manual_cast)
    return {
        name: (torch.randn(tensor.shape) * 0.1 + ("norm" in name or "ln_q" in name)).bfloat16()
        for name, tensor in model.state_dict().items()
    }


class Parts:
    """Wall time of parts of an edit, in ms, the device waited for before and after."""

    def __init__(self):
        self.ms: dict[str, float] = {}

    @contextmanager
    def measured(self, places: list[tuple[str, Any, str]]) -> Iterator[None]:
        """While this is open, ``getattr(owner, name)`` of each (part, owner, name) is timed."""
        before = [(owner, name, name in vars(owner), getattr(owner, name)) for _, owner, name in places]
        for (part, owner, name), (*_, call) in zip(places, before, strict=True):
            setattr(owner, name, self._timed(part, call))
        try:
            yield
        finally:
            for owner, name, own, call in before:
                setattr(owner, name, call) if own else delattr(owner, name)

    def _timed(self, part: str, call: Callable) -> Callable:
        def timed(*given, **named):
            found = []
            self.ms[part] = self.ms.get(part, 0) + wall(lambda: found.append(call(*given, **named)))
            return found[0]

        return timed


class Ops(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="folder of random_weights.py")
    parser.add_argument("--encoder", help="another file in its text_encoders")
    parser.add_argument("--tiny", action="store_true", help="a small encoder and VAE instead, to try the script")
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--side", type=int, default=1024, help="pixels, a multiple of 32")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--name", default="encoding", help="of the result file")
    parser.add_argument("--results", type=Path, help="folder for it (default: benchmarks/results)")
    options = parser.parse_args()
    if not (options.models or options.tiny):
        parser.error("--models or --tiny")
    start_dynamic_vram(options.comfyui.resolve())
    torch.manual_seed(0)
    sd, picture_vae = import_comfyui(options.comfyui.resolve())
    encoding, prompts = import_module("pack.nodes.host.encoding"), import_module("pack.nodes.host.prompts")
    text_encoder = import_module("pack.qwen_edit.text_encoder")
    node = import_module("comfy_extras.nodes_qwen").TextEncodeQwenImageEditPlus
    kind = sd.CLIPType.QWEN_IMAGE
    if options.tiny:
        names = import_module("comfy.text_encoders.llama"), import_module("comfy.text_encoders.qwen_vl")
        state = shrink(*names)
        clips = {name: sd.load_text_encoder_state_dicts([dict(state)], clip_type=kind) for name in (NATIVE, FP32)}
    else:
        path = options.models / "text_encoders" / (options.encoder or "random_text_encoders.safetensors")
        clips = {name: sd.load_clip([str(path)], clip_type=kind) for name in (NATIVE, FP32)}
    clips[BF16] = clips[FP32].clone()
    if not prompts.ask_for_bfloat16(clips[BF16]):
        clips[BF16].patcher.set_attachments(prompts.ACTIVATIONS, torch.bfloat16)
        print("The loader would not choose bf16 here; it is measured all the same.")
    weights = random_state(8) if options.tiny else random_state()
    native_vae, vae = (sd.VAE(sd=dict(weights)) for _ in range(2))
    native_vae.not_video = vae.not_video = True
    picture_vae.run_pictures_in_2d(vae)
    import_module("pack.nodes.host.memory").prepare_once(vae.patcher)  # as the pack's loader does

    edits = iter(range(10**6))

    def edit() -> tuple[str, tuple[torch.Tensor, ...]]:
        number = next(edits)
        pictures = tuple(torch.rand(1, options.side, options.side, 3) for _ in range(options.pictures))
        return PROMPT.format(THINGS[number % len(THINGS)]) + "!" * (number // len(THINGS)), pictures

    def by_nodes(prompt: str, pictures: tuple[torch.Tensor, ...]) -> None:
        images = {f"image{i + 1}": picture for i, picture in enumerate(pictures)}
        for text in (prompt, " "):
            # it encodes every picture at one megapixel, which is not what a try on the CPU should wait for
            node.execute(clips[NATIVE], text, None if options.tiny else native_vae, **images)

    def by_pack(name: str) -> Callable:
        return lambda prompt, pictures: encoding.Encoder(clips[name], vae).encode(encoding.Edit(prompt, " ", pictures))

    def parts_of(name: str) -> list[tuple[str, Any, str]]:
        load = [("load", import_module("comfy.model_management"), "load_models_gpu")]
        if name != NATIVE:
            return [("vision", prompts, "_look"), ("language", prompts, "read_together"), *load]
        transformer = clips[NATIVE].cond_stage_model.qwen25_7b.transformer
        return [("vision", transformer, "preprocess_embed"), ("language", transformer, "forward"), *load]

    calls = {NATIVE: by_nodes, BF16: by_pack(BF16), FP32: by_pack(FP32)}
    # by_pack's two share one model, so they don't take turns: a change of patchers is a load
    times: dict[str, list[float]] = {name: [] for name in calls}
    for pair in ((NATIVE, BF16), (NATIVE, FP32)):
        for index in range(options.repeat + 2):
            for name in pair:
                given = edit()
                ms = wall(lambda call=calls[name], given=given: call(*given))
                if index > 1:
                    times[name].append(ms)

    prompt, pictures = edit()
    small = [torch.nn.functional.interpolate(p.movedim(-1, 1), (384, 384)).movedim(1, -1) for p in pictures]
    texts = [text_encoder.with_pictures(text, len(pictures)) for text in (prompt, " ")]
    tokens = [clips[NATIVE].tokenize(text, images=small, llama_template=text_encoder.EDIT_TEMPLATE) for text in texts]
    expected = [clips[NATIVE].encode_from_tokens_scheduled(given)[0][0].float() for given in tokens]
    rows = []
    for name, call in calls.items():
        found = (
            [made[0][0].float() for made in prompts.encode_prompts(clips[name], tokens, {})]
            if name != NATIVE
            else expected
        )
        errors = [((mine - theirs).norm() / theirs.norm()).item() for mine, theirs in zip(found, expected, strict=True)]
        samples: dict[str, list[float]] = {}
        for _ in range(3):
            parts, given = Parts(), edit()
            with parts.measured(parts_of(name)):
                call(*given)
            for part, ms in parts.ms.items():
                samples.setdefault(part, []).append(ms)
        given = edit()
        with Ops() as ops:
            call(*given)
        rows.append(
            {
                "path": name,
                "encode_ms": round(statistics.median(times[name]), 1),
                **{f"{part}_ms": round(statistics.median(values), 1) for part, values in samples.items()},
                "ops": ops.count,
                "error": [float(f"{error:.2g}") for error in errors],
            }
        )
        print(rows[-1], flush=True)
    result = {
        "benchmark": "encoding",
        "environment": environment(),
        "encoder": "tiny" if options.tiny else path.name,
        "pictures": options.pictures,
        "side": options.side,
        "tokens": [made.shape[1] for made in expected],
        "rows": rows,
    }
    print(f"Wrote {keep(options.name, result, options.results)}")


if __name__ == "__main__":
    main()
