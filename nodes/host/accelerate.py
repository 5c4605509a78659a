"""Our forward over a MODEL that another loader made: a wrapper around its transformer's own forward.

ComfyUI's transformer has diffusers' names, so ``denoise`` runs over its modules. Weights are read through ComfyUI's own
casting, so offloading, DynamicVRAM and native LoRAs work as without us. What the forward does not honour runs
natively, and the node that samples says why.
"""

from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.patcher_extension
import torch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context

from ...qwen_edit.attention import CHOICES, KernelChoice, resolve
from ...qwen_edit.doctor import examine_model
from ...qwen_edit.errors import INPUT
from ...qwen_edit.kernels import FusedKernels, resolve_kernels
from ...qwen_edit.linear import runs_itself
from ...qwen_edit.modulation import ModulationCache
from ...qwen_edit.quantize import QuantizedTensor, activation_dtype, multiplies
from ...qwen_edit.transformer import Forward
from ...qwen_edit.values import check_choice, check_kind
from . import folders, notes
from .cast_weights import CastWeights, KnownWeights, PagedOperands, asks_for_more
from .doctor import Report, keep_facts, report
from .facts import native_model_facts
from .forward import run_forward
from .lora import LoraTarget, active_adapters, modulation_key
from .memory import WHEN_FREED
from .model import REFERENCE_TIMESTEP_ZERO, HostTransformer, not_honoured

KEY = "qwen_edit_accelerate"
NATIVE_FORWARD = QwenImageTransformer2DModel._forward


@dataclass
class Kept:
    """What the forwards of one accelerated transformer leave for the next."""

    modulation: ModulationCache = field(default_factory=ModulationCache)
    weights: KnownWeights = field(default_factory=KnownWeights)


_KEPT: WeakKeyDictionary[torch.nn.Module, Kept] = WeakKeyDictionary()
WHEN_FREED.append(_KEPT.clear)


def accelerate(model, attention: str):
    """A clone of ``model`` with our forward, and the report that says what will run.

    Raises:
        ValueError: a MODEL of another family, or an attention that is not offered.
    """
    check_choice("attention", attention, CHOICES)
    check_kind("model", model, ModelPatcher, "a MODEL")
    transformer = model.get_model_object("diffusion_model")
    if isinstance(transformer, HostTransformer):
        return model, Report(["This MODEL comes from QwenEditLoader and has the fast forward already."])
    if type(transformer) is not QwenImageTransformer2DModel:  # a subclass of another pack has a forward of its own
        raise ValueError(
            f"{INPUT} This MODEL holds {type(transformer).__name__}. QwenEditAccelerate is for Qwen-Image and"
            " Qwen-Image-Edit."
        )
    device, dtype = model.load_device, model.model.get_dtype_inference()
    head_dim = transformer.transformer_blocks[0].attn.dim_head
    choice = resolve(attention, device, dtype, head_dim, folders.tuned_attention())
    form = quantized_form(transformer)
    activations = _activations(transformer, device, dtype)
    kernels = resolve_kernels(device, dtype, activations)
    clone = model.clone()
    clone.remove_wrappers_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, KEY)
    clone.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, KEY, AcceleratedForward(choice, kernels, model)
    )
    clone.add_callback_with_key(
        comfy.patcher_extension.CallbacksMP.ON_DETACH,
        KEY,
        # ComfyUI also detaches, without unpatching, what it loads again a moment later
        lambda _, unpatch_all: _KEPT.pop(transformer, None) if unpatch_all else None,
    )
    facts = native_model_facts(dtype, transformer.default_ref_method == REFERENCE_TIMESTEP_ZERO, choice, kernels)
    keep_facts(model.model, facts)
    lines = [_summary(dtype, form, activations, choice, kernels), *report(examine_model(facts))]
    return clone, Report(lines, facts)


def lora_target(model) -> LoraTarget:
    """What QwenEditLoraSwitch reads LoRAs for.

    Raises:
        ValueError: the MODEL does not run our forward, which alone applies them.
    """
    require_our_forward(
        model, "applies these LoRAs", "load the model with Qwen Edit Loader, or use ComfyUI's own LoRA loader"
    )
    transformer = model.get_model_object("diffusion_model")
    if isinstance(transformer, HostTransformer):
        return LoraTarget({k: v for k, v in transformer.config.items() if not k.startswith("_")}, transformer.dtype)
    head_dim = transformer.transformer_blocks[0].attn.dim_head
    config = {
        "patch_size": transformer.patch_size,
        "in_channels": transformer.in_channels,
        "out_channels": transformer.out_channels,
        "num_layers": len(transformer.transformer_blocks),
        "attention_head_dim": head_dim,
        "num_attention_heads": transformer.inner_dim // head_dim,
        "joint_attention_dim": transformer.txt_in.in_features,
        "axes_dims_rope": tuple(transformer.pe_embedder.axes_dim),
    }
    return LoraTarget(config, model.model.get_dtype_inference())


def require_our_forward(model, does: str, instead: str) -> None:
    """
    Args:
        does, instead: for the message: what our forward alone does, what else can be done.

    Raises:
        ValueError: it is no MODEL, or neither our loader's nor accelerated.
    """
    check_kind("model", model, ModelPatcher, "a MODEL")
    ours = isinstance(model.get_model_object("diffusion_model"), HostTransformer)
    if not ours and not model.get_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, KEY):
        raise ValueError(
            f"{INPUT} This MODEL does not run our forward, which alone {does}. Put Qwen Edit Accelerate before this node,"
            f" {instead}."
        )


def quantized_form(transformer) -> str | None:
    """comfy-kitchen's name for how the blocks' weights are quantized, by the first block's; None: they are not."""
    weight = transformer.transformer_blocks[0].attn.to_q.weight
    return weight._layout_cls if isinstance(weight, QuantizedTensor) else None


def _activations(transformer, device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """What our kernels quantize activations to; None: nothing, or ComfyUI multiplies with these weights itself."""
    first = transformer.transformer_blocks[0].attn.to_q
    form = quantized_form(transformer)
    wanted = None if form is None or asks_for_more(first) else activation_dtype(form)
    return wanted if wanted is not None and multiplies(device, wanted, dtype) else None


def _summary(
    dtype: torch.dtype, form: str | None, activations: torch.dtype | None, choice: KernelChoice, kernels: FusedKernels
) -> str:
    what = str(dtype).removeprefix("torch.")
    if form is not None:
        what += f", weights {form}"
        if activations is None:
            what += " (multiplied by ComfyUI)"
    return f"{what}, attention {choice.name}, kernels {kernels.name}"


class AcceleratedForward:
    """The wrapper: ComfyUI calls it with the transformer's own forward and its arguments."""

    def __init__(self, attention: KernelChoice, kernels: FusedKernels, model):
        self.attention, self.kernels = attention, kernels
        self._inner = model.model  # knows which patches are in the weights
        self._prompt: str | None = None
        self._said: set[tuple[str, str]] = set()  # of this prompt: node and text

    def __call__(self, executor, *args, **kwargs):
        """Runs innermost, in the native forward's place: wrappers that were added after this one run around it."""
        forward = comfy.patcher_extension.WrapperExecutor.new_class_executor(
            partial(self._forward, executor.class_obj, executor.original),
            executor.class_obj,
            executor.wrappers[executor.idx + 1 :],
        )
        return forward.execute(*args, **kwargs)

    def _forward(
        self,
        native,
        native_forward,
        x,
        timesteps,
        context,
        attention_mask=None,
        ref_latents=None,
        additional_t_cond=None,
        transformer_options={},  # noqa: B006 (ComfyUI's convention; never written to)
        control=None,
        ref_latents_method=None,
        **kwargs,
    ):
        references = ref_latents or []
        method = ref_latents_method or native.default_ref_method
        problems = not_honoured(x, references, control, additional_t_cond, method, transformer_options)
        problems += _replaced_parts(native)
        if getattr(native_forward, "__func__", None) is not NATIVE_FORWARD:
            problems.append("a forward that another pack has put in its place")
        adapters = active_adapters(native, transformer_options)
        if problems and adapters:
            raise ValueError(
                f"{INPUT} ComfyUI's own forward has to run here, because of {', '.join(problems)}, and it does not apply the"
                " LoRAs of Qwen Edit LoRA Switch. Use ComfyUI's own LoRA loader for them."
            )
        if problems:
            self._say_once(f"Runs ComfyUI's own forward, because of {', '.join(problems)}.")
            given = {"control": control, "ref_latents_method": ref_latents_method}
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return native_forward(
                x, timesteps, context, attention_mask, ref_latents, additional_t_cond, transformer_options, **kwargs
            )
        comfy.model_management.throw_exception_if_processing_interrupted()
        kept = _KEPT.setdefault(native, Kept())
        weights = CastWeights(x.device, x.dtype, kept.weights)
        forward = Forward(
            self.attention.attend, self.kernels, weights, adapters, positions="comfyui", known=PagedOperands(weights)
        )
        try:
            return run_forward(
                native,
                forward,
                (x, *references),
                timesteps,
                context,
                attention_mask,
                transformer_options,
                axes_dims=tuple(native.pe_embedder.axes_dim),
                zero_cond_t=method == REFERENCE_TIMESTEP_ZERO,
                modulation=kept.modulation if self._same_weights(native) else None,
                modulation_key=(self._inner.current_weight_patches_uuid, modulation_key(transformer_options)),
            )
        finally:
            weights.release()

    def _same_weights(self, native) -> bool:
        """Whether ``current_weight_patches_uuid`` names the weights: they may change between steps, or be another model's."""
        patcher = self._inner.current_patcher
        hooked = patcher is not None and patcher.current_hooks is not None
        return not hooked and native is self._inner.diffusion_model

    def _say_once(self, text: str) -> None:
        """Once for each prompt and node; a prompt calls this at every step."""
        context = get_executing_context()
        prompt, node = (context.prompt_id, context.node_id) if context is not None else ("", "")
        if prompt != self._prompt:
            self._prompt, self._said = prompt, set()
        if (node, text) not in self._said:
            self._said.add((node, text))
            notes.say(text)


def _replaced_parts(native) -> list[str]:
    """Modules that the forward does not call as a whole, but whose own forward somebody has replaced or hooked."""
    block_parts = ((block, block.attn, block.img_mlp, block.txt_mlp) for block in native.transformer_blocks)
    return ["replaced blocks"] if any(runs_itself(part) for parts in block_parts for part in parts) else []
