"""Our transformer as a MODEL of ComfyUI: a ``QwenImage`` whose ``diffusion_model`` is diffusers' transformer."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import comfy.latent_formats
import comfy.ldm.common_dit
import comfy.model_base
import comfy.model_management
import comfy.patcher_extension
import comfy.supported_models
import comfy.utils
import torch

from ...qwen_edit.attention import KernelChoice
from ...qwen_edit.checkpoints import ZERO_COND_MARKER, TransformerSource, check_tensors, fill
from ...qwen_edit.errors import INPUT, MEMORY
from ...qwen_edit.extra_channels import ExtraChannels
from ...qwen_edit.fused_lora import FusedLoras
from ...qwen_edit.kernels import FusedKernels
from ...qwen_edit.modulation import ModulationCache
from ...qwen_edit.packed import keep_packed, unpatch
from ...qwen_edit.precision import Precision
from ...qwen_edit.quantize import drop_weights, prepare, stored_bytes
from ...qwen_edit.rope import Positions
from ...qwen_edit.stored_weights import keep_stored
from ...qwen_edit.streaming import BlockStream
from ...qwen_edit.transformer import Forward, QwenEditTransformer, denoise
from . import notes
from .fused import PinnedMemory, SecondCopy, SecondCopyPatcher, adapters_for
from .lora import modulation_key
from .memory import ShellPatcher
from .pinning import BackgroundPins, PinnedBlocks
from .transformer_patcher import Offload, Sizes, TransformerPatcher

POSITIONS = "qwen_edit_positions"  # key in transformer_options; ComfyUI's own when absent, as for any MODEL
STEPS = "qwen_edit_steps"  # key in transformer_options: our sampler's KnownSteps
REFERENCE_TIMESTEP_ZERO = "index_timestep_zero"
REFERENCE_METHODS = ("index", REFERENCE_TIMESTEP_ZERO)


@dataclass
class KnownSteps:
    """Which step our sampler is at, so that no forward has to wait for the card to say its timestep. Euler asks for
    each sigma of the schedule once."""

    sigmas: list[float]
    done: int = 0


class HostTransformer(QwenEditTransformer):
    """The engine's transformer with ComfyUI's calling convention."""

    attention: KernelChoice
    kernels: FusedKernels
    precision: Precision
    modulation: ModulationCache
    weights_version: object = None  # changes with the patches in the weights
    channels: ExtraChannels | None = None  # None: LoRAs are added to the results
    stream: BlockStream  # of the blocks that stay in RAM between their turns
    fused: FusedLoras
    host_memory: PinnedMemory  # where the weights are kept while LoRAs are in them, if the card has no room
    nbytes: int  # on the card
    refused_in: object = None  # the run that was told that its LoRAs can't be in the weights

    @property
    def streamed(self) -> bool:
        """Whether blocks stay in RAM between their turns."""
        return bool(self.stream.streamed)

    def forget(self) -> None:
        """Let go of what was made of the weights: they leave the card, or are dropped."""
        self.fused.drop()
        self.modulation.clear()
        if self.channels is not None:
            self.channels.clear()

    @property
    def dtype(self) -> torch.dtype:
        """ComfyUI asks several times a step; diffusers' own answer walks through all modules."""
        return self.precision.dtype

    def forward(
        self,
        x,
        timesteps,
        context,
        attention_mask=None,
        ref_latents=None,
        additional_t_cond=None,
        transformer_options={},  # noqa: B006 (ComfyUI's convention; never written to)
        **kwargs,
    ):
        """Velocity, shaped as ``x``.

        Args:
            x: noisy latents ``[B, 16, 1, h, w]``, normalized.
            timesteps: sigma ``[B]``.
            context: hidden states ``[B, L, C]``.
            ref_latents: reference latents, each ``[B, 16, 1, h', w']``, normalized.

        Raises:
            ValueError: control, block patches, attention overrides, or a reference method that is not honoured.
        """
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward,
            self,
            comfy.patcher_extension.get_all_wrappers(
                comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
            ),
        )
        return executor.execute(
            x,
            timesteps,
            context,
            attention_mask,
            ref_latents,
            additional_t_cond,
            transformer_options,
            **kwargs,
        )

    def _forward(
        self,
        x,
        timesteps,
        context,
        attention_mask=None,
        ref_latents=None,
        additional_t_cond=None,
        transformer_options={},  # noqa: B006
        control=None,
        ref_latents_method=None,
        **kwargs,
    ):
        comfy.model_management.throw_exception_if_processing_interrupted()
        references = ref_latents or []
        _refuse_what_is_not_honoured(x, references, control, additional_t_cond, ref_latents_method, transformer_options)
        width = self.config.joint_attention_dim
        if context.shape[-1] != width:
            raise ValueError(
                f"{INPUT} The conditioning is {context.shape[-1]} wide, this model needs {width}: it was made with the text"
                " encoder of another model."
            )
        method = ref_latents_method
        with self.stream as stream:
            forward = Forward(
                self.attention.attend,
                self.kernels,
                adapters=adapters_for(self, x, transformer_options),
                # in buffers there is no room behind the weights, and on a card without room for them twice none for more
                channels=None if stream.streamed or self.fused.in_ram else self.channels,
                positions=transformer_options.get(POSITIONS, "comfyui"),
                before_block=stream.before_block,
            )
            return run_forward(
                self,
                forward,
                (x, *references),
                timesteps,
                context,
                attention_mask,
                transformer_options,
                axes_dims=tuple(self.config.axes_dims_rope),
                zero_cond_t=self.config.zero_cond_t if method is None else method == REFERENCE_TIMESTEP_ZERO,
                modulation=self.modulation,
                modulation_key=(self.weights_version, modulation_key(transformer_options)),
            )


ROWS_WHEN_SHORT = 2048


def run_forward(
    model, forward: Forward, latents, timesteps, context, attention_mask, transformer_options, **of_the_model
) -> torch.Tensor:
    """``denoise`` over ComfyUI's arguments; if memory runs out, once more item by item and with the MLPs in parts.

    Args:
        latents: output and references, each ``[B, 16, 1, h, w]``.
        attention_mask: of the text, boolean or ComfyUI's additive form; None: all of it counts.
        of_the_model: what else ``denoise`` is told.

    Returns:
        Velocity, shaped as the output.

    Raises:
        torch.OutOfMemoryError: memory ran out again; ComfyUI then unloads all models.
    """
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask >= 0  # ComfyUI's additive masks: 0 attends, hugely negative hides
    tokens, grids = zip(*(_pack(picture) for picture in latents), strict=True)
    # diffusers rounds the timestep to the model's dtype; ComfyUI does not
    rounded = latents[0].dtype if forward.positions == "diffusers" else None
    timestep, schedule = _known_times(timesteps, transformer_options, rounded)

    def run(forward: Forward, items: slice = slice(None)) -> torch.Tensor:
        packed = torch.cat([t[items] for t in tokens], dim=1)
        mask = None if attention_mask is None else attention_mask[items]
        options: dict[str, Any] = {"text_mask": mask, "schedule": schedule, **of_the_model}
        velocity = denoise(model, packed, timestep[items], context[items], grids, forward, **options)
        return _unpack(velocity, grids[0], latents[0][items].shape)

    try:
        return run(forward)
    except Exception as e:
        _raise_unless_memory(e)  # the rest outside, so that the tensors of the failed run are free
    forward.weights.release()
    comfy.model_management.soft_empty_cache()
    batch = len(latents[0])
    one_by_one = f"its {batch} pictures one by one and " if batch > 1 else ""
    notes.say(f"Out of memory: trying once more with {one_by_one}the MLPs in parts, which is a little slower.")
    smaller = replace(forward, mlp_rows=ROWS_WHEN_SHORT)
    try:
        return torch.cat([run(smaller, slice(i, i + 1)) for i in range(batch)])
    except Exception as e:
        _raise_unless_memory(e)
        reason = str(e)
    raise torch.OutOfMemoryError(
        f"{MEMORY} There is not enough memory for this edit, in parts neither. Choose a smaller size, fewer pictures, a"
        f" smaller precision (profile 'fast' or 'small') or offload 'stream' on the loader. ({reason})"
    )


def _raise_unless_memory(e: Exception) -> None:
    """Raise what is no lack of memory, on the card (as ComfyUI tells it) or in RAM."""
    if not (isinstance(e, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(e)):
        comfy.model_management.raise_non_oom(e)


def _known_times(timesteps: torch.Tensor, transformer_options, rounded: torch.dtype | None):
    """The timesteps ``[B]``, on the CPU where they are known without asking the card, and the schedule they belong to.

    Args:
        rounded: the dtype to which both are rounded; None: float32.
    """
    dtype = rounded or torch.float32
    steps: KnownSteps | None = transformer_options.get(STEPS)
    if steps is not None:
        schedule = torch.tensor(steps.sigmas).to(dtype)
        return schedule[steps.done].expand(len(timesteps)), schedule.tolist()
    sigmas = transformer_options.get("sample_sigmas")
    return timesteps.to(dtype), [] if sigmas is None else sigmas.to(dtype).tolist()


def not_honoured(x, references, control, additional_t_cond, method, transformer_options) -> list[str]:
    """What is asked of a forward that ours does not do."""
    problems = []
    if control is not None:
        problems.append("a ControlNet")
    problems += [f"{kind} patches" for kind, patches in transformer_options.get("patches", {}).items() if patches]
    if any(transformer_options.get("patches_replace", {}).values()):
        problems.append("replaced blocks or attention")
    if "optimized_attention_override" in transformer_options:
        problems.append("an attention override (choose the attention on our node instead)")
    if additional_t_cond is not None:
        problems.append("additional timestep conditioning")
    if method is not None and method not in REFERENCE_METHODS:
        problems.append(f"the reference method {method!r} (it knows {' and '.join(REFERENCE_METHODS)})")
    for what, latents in (("latents", x), *(("reference latents", r) for r in references)):
        if latents.ndim != 5 or latents.shape[2] != 1:
            problems.append(f"{what} of {list(latents.shape)} (it edits pictures: [B, 16, 1, height/8, width/8])")
    return problems


def _refuse_what_is_not_honoured(*asked) -> None:
    problems = not_honoured(*asked)
    if problems:
        raise ValueError(
            f"{INPUT} This MODEL comes from QwenEditLoader, whose forward does not support {', '.join(problems)}. Remove"
            " it, or load the model with ComfyUI's own loader."
        )


def _pack(latents: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """``[B, C, 1, h, w]`` -> 2x2 patches ``[B, rows * columns, 4C]`` and (rows, columns); odd sides are padded."""
    padded = comfy.ldm.common_dit.pad_to_patch_size(latents, (1, 2, 2))
    rows, columns = padded.shape[-2] // 2, padded.shape[-1] // 2
    patches = padded[:, :, 0].unflatten(-1, (columns, 2)).unflatten(-3, (rows, 2))  # B C rows 2 columns 2
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), (rows, columns)


def _unpack(tokens: torch.Tensor, grid: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    patches = tokens.unflatten(1, grid).unflatten(-1, (-1, 2, 2))  # B rows columns C 2 2
    latents = patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).unsqueeze(2)
    return latents[..., : shape[-2], : shape[-1]]


class QwenEditModel(comfy.model_base.QwenImage):
    """ComfyUI's Qwen-Image around our transformer; a shell (see ``memory.py``)."""

    diffusion_model: HostTransformer
    second_copy: SecondCopyPatcher  # of the weights, while LoRAs are in them

    def __init__(
        self,
        source: TransformerSource,
        precision: Precision,
        latent_format,
        attention: KernelChoice,
        kernels: FusedKernels,
        offload: Offload,
    ):
        config = comfy.supported_models.QwenImage(
            {"image_model": "qwen_image", "disable_unet_model_creation": True, "dtype": precision.dtype}
        )
        config.latent_format = latent_format
        super().__init__(config)
        self.source = source
        self._pins = BackgroundPins()
        with torch.device("meta"):
            transformer = HostTransformer.from_config(dict(source.config)).eval()
        check_tensors(transformer, source)
        # diffusers' own .to warns about layers to keep in float32; this model has none.
        self.diffusion_model = torch.nn.Module.to(transformer, precision.dtype)
        prepare(self.diffusion_model, None if precision.stored else precision.form)
        keep_packed(self.diffusion_model, source.blocks, precision.form)
        if precision.form is not None:
            keep_stored(
                self.diffusion_model,
                source.stored,
                comfy.model_management.get_torch_device(),
                precision.products,
                modulation_only=not precision.stored,
                full_precision=precision.wanted == "auto",
            )
        self.diffusion_model.requires_grad_(False)
        self.diffusion_model.attention = attention
        self.diffusion_model.kernels = kernels
        self.diffusion_model.precision = precision
        self.diffusion_model.modulation = ModulationCache()
        self.diffusion_model.stream = BlockStream(self.diffusion_model.transformer_blocks, PinnedBlocks())
        self.offload: Offload = offload
        self.sizes = Sizes.of(self.diffusion_model)
        self.said = ""  # by the patcher, about blocks that are streamed
        self.diffusion_model.fused = FusedLoras(self.diffusion_model)
        self.diffusion_model.host_memory = PinnedMemory()
        self.diffusion_model.nbytes = stored_bytes(self.diffusion_model)

    @property
    def is_empty(self) -> bool:
        return self.diffusion_model.img_in.weight.is_meta

    def fill(self, device: torch.device) -> None:
        logging.info("Qwen Edit Fast: reading the transformer of %s", self.source.label)
        stream = self.diffusion_model.stream
        bar = comfy.utils.ProgressBar(100)
        try:
            fill(
                self.diffusion_model,
                self.source,
                self.diffusion_model.dtype,
                device,
                lambda done, total: bar.update_absolute(round(100 * done / total)),
                self._pins.add if device.type != "cpu" else None,  # there they are the file's own pages
                lambda index: stream.lay(index) if index in stream.streamed else None,
            )
        except BaseException:  # cancelled too: the next load reads all of them
            self.empty()
            raise

    def state_dict_for_saving(self, unet_state_dict, *args, **kwargs):
        """For ComfyUI's nodes that save a MODEL: with the mark of 2511, as its own."""
        form = self.diffusion_model.precision.form
        if form is not None:
            raise ValueError(
                f"{INPUT} A MODEL of QwenEditLoader in {form} can't be saved. Choose precision bf16 on the loader first."
            )
        marker = {ZERO_COND_MARKER: torch.tensor([])} if self.diffusion_model.config.zero_cond_t else {}
        return super().state_dict_for_saving(unet_state_dict | marker, *args, **kwargs)

    def empty(self) -> None:
        self._pins.release()
        self.diffusion_model.stream.close()
        self.diffusion_model.forget()
        unpatch(self.diffusion_model)
        drop_weights(self.diffusion_model, self.diffusion_model.precision.dtype)


def latent_format(statistics: dict | None):
    """ComfyUI's format of this family, or one with a folder's own VAE statistics.

    Args:
        statistics: ``latents_mean``, ``latents_std`` (16 each) and, for previews, ``latent_rgb_factors`` (16 x 3)
            and ``latent_rgb_factors_bias``; None for the released VAE.
    """
    result = comfy.latent_formats.Wan21()
    if statistics is not None:
        result.latents_mean = torch.tensor(statistics["latents_mean"]).view(1, 16, 1, 1, 1)
        result.latents_std = torch.tensor(statistics["latents_std"]).view(1, 16, 1, 1, 1)
        result.taesd_decoder_name = None  # a tiny decoder of another latent space would show noise
        result.latent_rgb_factors = statistics.get("latent_rgb_factors")
        result.latent_rgb_factors_bias = statistics.get("latent_rgb_factors_bias")
    return result


def make_model(
    source: TransformerSource,
    precision: Precision,
    statistics: dict | None,
    attention: KernelChoice,
    kernels: FusedKernels,
    *,
    stream: bool = False,
    keep_on_card: bool = False,
) -> ShellPatcher:
    """A MODEL whose weights are read, and quantized, when it is first used.

    Args:
        stream: all blocks stay in RAM between their turns; otherwise those for which the card has no room.
        keep_on_card: none does, and what ComfyUI unloads stays on the card, as with its --highvram.
    """
    offload: Offload = "stream" if stream else "none" if keep_on_card else "auto"
    model = QwenEditModel(source, precision, latent_format(statistics), attention, kernels, offload)
    card = comfy.model_management.get_torch_device()
    if card.type == "cuda":
        model.diffusion_model.channels = ExtraChannels()
    model.second_copy = SecondCopyPatcher(SecondCopy(model.diffusion_model), card, torch.device("cpu"))
    if stream:  # the CPU, whatever ComfyUI's --highvram says
        return TransformerPatcher(model, load_device=card, offload_device=torch.device("cpu"))
    away = card if keep_on_card else comfy.model_management.unet_offload_device()
    return TransformerPatcher(model, load_device=card, offload_device=away)


def with_positions(model, positions: Positions):
    """A clone whose forward counts token positions as diffusers or as ComfyUI does."""
    clone = model.clone()
    clone.model_options["transformer_options"][POSITIONS] = positions
    return clone
