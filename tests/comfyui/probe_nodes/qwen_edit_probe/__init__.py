"""Nodes and one route that the server tests look through; loaded by the tests' server only.

`/qwen_edit_probe` tells what ComfyUI's memory manager and the pack's owners hold, without queueing a prompt.
"""

import contextlib
import dataclasses
import gc
import sys
import threading

import comfy.controlnet
import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import psutil
import torch
from aiohttp import web
from comfy.model_patcher import ModelPatcher
from server import PromptServer

import nodes as comfy_nodes

from .small_encoder import small_sizes

_detect_unet_config = comfy.model_detection.detect_unet_config


def _detect_any_width(state_dict, key_prefix, *args, **kwargs):
    """ComfyUI's detection, which knows Qwen-Image at its released width only, for small test files."""
    config = _detect_unet_config(state_dict, key_prefix, *args, **kwargs)
    if config is not None and config.get("image_model") == "qwen_image":
        config["num_attention_heads"] = state_dict[f"{key_prefix}img_in.weight"].shape[0] // 128
        config["joint_attention_dim"] = state_dict[f"{key_prefix}txt_norm.weight"].shape[0]
    return config


comfy.model_detection.detect_unet_config = _detect_any_width


_init_clip = comfy.sd.CLIP.__init__


def _init_any_width(self, *args, state_dict=(), **kwargs):
    """ComfyUI's, which knows the text encoder of Qwen-Image at its released width only, for small test files."""
    names = {
        k: t for state in (state_dict if isinstance(state_dict, list) else [state_dict]) for k, t in dict(state).items()
    }
    embeddings = next((t for name, t in names.items() if name.endswith("model.embed_tokens.weight")), None)
    small = embeddings is not None and embeddings.shape[1] < 3584
    with small_sizes(embeddings.shape[1], heads=4, kv_heads=4) if small else contextlib.nullcontext():
        _init_clip(self, *args, state_dict=state_dict, **kwargs)


comfy.sd.CLIP.__init__ = _init_any_width


class _Any(str):
    """A type that every input accepts."""

    def __ne__(self, other):
        return False


ANY = _Any("*")


def pack_module(name: str):
    """The pack's module `nodes.host.<name>`, under whatever name ComfyUI imported it."""
    return next((m for key, m in list(sys.modules.items()) if key.endswith(f".nodes.host.{name}")), None)


def _is_made(shell) -> bool:
    """Not a transformer that was refused half-way, while ComfyUI still holds the error."""
    return type(shell).__name__ != "QwenEditModel" or hasattr(shell, "diffusion_model")


@PromptServer.instance.routes.get("/qwen_edit_probe")
async def look(request):
    gc.collect()
    loading, lora, accelerate = (pack_module(name) for name in ("loading", "lora", "accelerate"))
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    shells = {}
    for thing in gc.get_objects():
        if type(thing).__name__ in ("QwenEditModel", "FolderTextModel", "ResidentLora") and _is_made(thing):
            shells.setdefault(type(thing).__name__, []).append(thing.is_empty)
    return web.json_response(
        {
            "loaded": [type(p.model).__name__ for p in loaded if p is not None],
            "shells": shells,
            "owned": len(loading.OWNER._kept) if loading else 0,
            "loras": len(lora.POOL._kept) if lora else 0,
            "modulation tables": [
                id(table)
                for kept in (accelerate._KEPT.values() if accelerate else ())
                for tables in kept.modulation._tables.values()
                for table in tables
            ],
            "threads": threading.active_count(),
            "rss": psutil.Process().memory_info().rss,
            "modules": sorted(n for n in ("diffusers", "transformers", "peft", "accelerate") if n in sys.modules),
            "cuda": torch.cuda.is_initialized(),
            "collector": {"aside": gc.get_freeze_count(), "looks at": len(gc.get_objects())},
        }
    )


_AUDITED = (
    "open",
    "os.",
    "shutil.",
    "socket.",
    "subprocess.",
    "pickle.find_class",
    "ftplib.",
    "urllib.",
    "webbrowser.",
)
_audit: list[list[str]] | None = None
_hooked = False


def _record(event, arguments):
    if _audit is not None and event.startswith(_AUDITED):
        _audit.append([event, threading.current_thread().name, *(repr(a) for a in arguments)])


@PromptServer.instance.routes.get("/qwen_edit_probe/audit")
async def audit(request):
    """What Python's audit events (files, network, processes, pickle) told since the last call; listening goes on."""
    global _audit, _hooked
    if not _hooked:
        sys.addaudithook(_record)
        _hooked = True
    told, _audit = _audit, []
    return web.json_response(told or [])


@PromptServer.instance.routes.get("/qwen_edit_probe/routes")
async def routes(request):
    """[method, path] of every route whose handler is the pack's."""
    pack = pack_module("doctor").__name__.removesuffix(".nodes.host.doctor")
    found = [
        [route.method, route.resource.canonical]
        for route in PromptServer.instance.app.router.routes()
        if route.resource is not None and getattr(route.handler, "__module__", "").startswith(pack)
    ]
    return web.json_response(found)


class Pass:
    """Hands a value on, once there is `after`; another nonce makes everything after it run again."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "run", (ANY,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (ANY,), "nonce": ("STRING",)}, "optional": {"after": (ANY,)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def run(self, value, nonce, after=None):
        return (value,)


class Number:
    """A number that no widget would let through; without a decimal point an integer."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "run", (ANY,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING",)}}

    def run(self, text):
        try:
            return (int(text),)
        except ValueError:
            return (float(text),)


class Text:
    """A text for a combo."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "run", (ANY,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING",)}}

    def run(self, text):
        return (text,)


class Json:
    """Any value that JSON knows, wrapped in an object because ComfyUI takes every list for a link."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "run", (ANY,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (ANY,)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def run(self, value):
        return (value["is"],)


class Picture:
    """An IMAGE of any shape ("2,64,64,3") filled with one number, or a "ramp"."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "run", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        required = {"shape": ("STRING",), "fill": ("STRING",)}
        return {"required": required, "optional": {"dtype": ("STRING", {"default": "float32"})}}

    def run(self, shape, fill, dtype="float32"):
        return (self.made(shape, fill).to(getattr(torch, dtype)),)

    def made(self, shape, fill):
        size = [int(s) for s in shape.split(",")]
        if fill == "ramp":
            count = max(1, torch.Size(size).numel())
            return torch.arange(count).float().mul(7).remainder(256).div(255).view(size)
        return torch.full(size, float(fill))


class PictureList(Picture):
    """Two pictures of different sizes, as a list."""

    OUTPUT_IS_LIST = (True,)

    def run(self, shape, fill, dtype="float32"):
        return ([self.made(one, fill) for one in shape.split(";")],)


class Unchanged:
    """Fails unless the IMAGE is still of one value, as ProbePicture made it; runs after `after`."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "run", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "after": (ANY,)}}

    def run(self, image, after):
        if image.unique().numel() != 1 or image.dtype != torch.float32:
            raise RuntimeError("The picture was changed.")
        return ()


class Damage:
    """A LATENT with one number replaced, or of another shape."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "run", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",), "kind": ("STRING",)}}

    def run(self, latent, kind):
        samples = latent["samples"].clone()
        if kind == "twice":
            samples = samples.repeat(2, 1, 1, 1, 1)
        elif kind == "video":
            samples = samples.repeat(1, 1, 3, 1, 1)
        elif kind == "empty":
            samples = samples[:0]
        else:
            samples.view(-1)[5] = float(kind)
        return (latent | {"samples": samples},)


class Patch:
    """A MODEL with something that other packs add to a transformer."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "run", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "kind": ("STRING",)}}

    def run(self, model, kind):
        clone = model.clone()
        if kind == "block":
            clone.set_model_double_block_patch(lambda args: args)
        elif kind == "replace":
            clone.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 0)
        elif kind == "attention":
            options = clone.model_options["transformer_options"]
            options["optimized_attention_override"] = lambda original, *args, **kwargs: original(*args, **kwargs)
        elif kind == "foreign":
            holder = torch.nn.Module()
            holder.diffusion_model = torch.nn.Linear(2, 2)
            return (ModelPatcher(holder, torch.device("cpu"), torch.device("cpu")),)
        elif kind in ("nan", "inf"):
            clone.set_model_unet_function_wrapper(lambda apply, args: args["input"] * float(kind))
        elif kind.startswith("nan at "):  # only in a run of so many steps
            steps = int(kind.split()[-1])

            def poisoned(apply, args):
                result = apply(args["input"], args["timestep"], **args["c"])
                sigmas = args["c"]["transformer_options"]["sample_sigmas"]
                return result * float("nan") if len(sigmas) == steps + 1 else result

            clone.set_model_unet_function_wrapper(poisoned)
        elif kind == "oom":
            clone.set_model_unet_function_wrapper(_out_of_memory)
        return (clone,)


def _out_of_memory(apply, args):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory (a test)")


class OutOfMemory:
    """The MODEL; the attention of our forward runs out of memory the next `times` times.

    kind: "raised", as a card's allocator says it; "allocated": 64 TiB are really asked for; "batch": each time that it
    is given more than one item.
    """

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "run", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        required = {"model": ("MODEL",), "times": ("INT",), "nonce": ("STRING",)}
        return {"required": required, "optional": {"kind": ("STRING", {"default": "raised"})}}

    def run(self, model, times, nonce, kind="raised"):
        wrappers = model.get_wrappers("diffusion_model", "qwen_edit_accelerate")
        holder = wrappers[0] if wrappers else model.model.diffusion_model
        whole, left = holder.attention, times

        def attend(*args, **kwargs):
            nonlocal left
            if kind == "batch" and len(args[0]) == 1:
                return whole.attend(*args, **kwargs)
            left -= 1
            if left < 0:
                return whole.attend(*args, **kwargs)
            if left == 0:
                holder.attention = whole
            if kind == "allocated":
                torch.empty(2**46, dtype=torch.uint8)
            _out_of_memory(None, None)

        holder.attention = dataclasses.replace(whole, attend=attend)
        return (model,)


class FP8Products:
    """The MODEL, whose fp8 layers multiply quantized activations, as on a card that has such products."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "run", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def run(self, model):
        for module in model.model.diffusion_model.modules():
            if isinstance(module, torch.nn.Module) and "_full_precision_mm" in vars(module):
                module._full_precision_mm = False
        return (model,)


class Conditioning:
    """Random CONDITIONING [1, tokens, width]."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "run", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"tokens": ("INT",), "width": ("INT",), "seed": ("INT",)}}

    def run(self, tokens, width, seed):
        return ([[torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)), {}]],)


class Latent:
    """A random LATENT [1, 16, frames, height, width], in units of the VAE's grid."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "run", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        size = {"height": ("INT",), "width": ("INT",), "seed": ("INT",)}
        return {"required": size, "optional": {"frames": ("INT", {"default": 1})}}

    def run(self, height, width, seed, frames=1):
        shape = (1, 16, frames, height, width)
        return ({"samples": torch.randn(shape, generator=torch.Generator().manual_seed(seed))},)


class Control:
    """CONDITIONING with a ControlNet."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "run", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",)}}

    def run(self, conditioning):
        return ([[cond, options | {"control": _Control()}] for cond, options in conditioning],)


class _Control(comfy.controlnet.ControlBase):
    def get_control(self, *args, **kwargs):
        return {"input": [torch.zeros(1, 1, 1)], "middle": [], "output": []}


class Widen:
    """CONDITIONING of another width."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "run", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",)}}

    def run(self, conditioning):
        return ([[torch.cat((cond, cond), dim=-1), options] for cond, options in conditioning],)


class CancelLoading(Pass):
    """Hands a value on; the next reading of weights is interrupted at its first progress report."""

    def run(self, value, nonce):
        original = comfy.utils.PROGRESS_BAR_HOOK

        def hook(*args, **kwargs):
            comfy.utils.set_progress_bar_global_hook(original)
            comfy_nodes.interrupt_processing(True)
            return original(*args, **kwargs)

        comfy.utils.set_progress_bar_global_hook(hook)
        return (value,)


NODE_CLASS_MAPPINGS = {
    "ProbePass": Pass,
    "ProbeNumber": Number,
    "ProbeText": Text,
    "ProbeJson": Json,
    "ProbePicture": Picture,
    "ProbePictureList": PictureList,
    "ProbeUnchanged": Unchanged,
    "ProbeDamage": Damage,
    "ProbePatch": Patch,
    "ProbeOutOfMemory": OutOfMemory,
    "ProbeFP8Products": FP8Products,
    "ProbeConditioning": Conditioning,
    "ProbeLatent": Latent,
    "ProbeControl": Control,
    "ProbeWiden": Widen,
    "ProbeCancelLoading": CancelLoading,
}
