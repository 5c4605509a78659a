"""Our transformer as a MODEL of ComfyUI: a ``QwenImage`` whose ``diffusion_model`` is diffusers' transformer."""

import logging

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.patcher_extension
import comfy.supported_models
import comfy.utils
import torch

from ...qwen_edit.attention import KernelChoice
from ...qwen_edit.checkpoints import ZERO_COND_MARKER, TransformerSource, check_tensors
from ...qwen_edit.errors import INPUT
from ...qwen_edit.extra_channels import ExtraChannels
from ...qwen_edit.filling import fill
from ...qwen_edit.fused_lora import FusedLoras
from ...qwen_edit.kernels import FusedKernels
from ...qwen_edit.known_operands import KnownOperands
from ...qwen_edit.linear import RESIDENT, WeightReader
from ...qwen_edit.modulation import ModulationCache
from ...qwen_edit.packed import keep_packed, unpatch
from ...qwen_edit.precision import Precision
from ...qwen_edit.quantize import drop_weights, prepare, stored_bytes
from ...qwen_edit.rope import Positions
from ...qwen_edit.stored_weights import keep_stored
from ...qwen_edit.streaming import BlockStream
from ...qwen_edit.transformer import Forward, QwenEditTransformer
from .forward import run_forward
from .fused import PinnedMemory, SecondCopy, SecondCopyPatcher, adapters_for
from .lora import modulation_key
from .memory import ShellPatcher
from .pinning import PinnedBlocks, page_lock
from .transformer_patcher import Offload, Sizes, TransformerPatcher

POSITIONS = "qwen_edit_positions"  # key in transformer_options; ComfyUI's own when absent, as for any MODEL
REFERENCE_TIMESTEP_ZERO = "index_timestep_zero"
REFERENCE_METHODS = ("index", REFERENCE_TIMESTEP_ZERO)


class HostTransformer(QwenEditTransformer):
    """The engine's transformer with ComfyUI's calling convention."""

    attention: KernelChoice
    kernels: FusedKernels
    precision: Precision
    modulation: ModulationCache
    weights_version: object = None  # changes with the patches in the weights
    channels: ExtraChannels | None = None  # None: LoRAs are added to the results
    weights: WeightReader = RESIDENT
    known: KnownOperands
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
                self.weights,
                adapters=adapters_for(self, x, transformer_options),
                # in buffers there is no room behind the weights, and on a card without room for them twice none for more
                channels=self.channels,
                spare_columns=not stream.streamed and not self.fused.in_ram,
                positions=transformer_options.get(POSITIONS, "comfyui"),
                before_block=stream.before_block,
                known=self.known,
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
        self.diffusion_model.known = KnownOperands()
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
            self.diffusion_model.weights = fill(
                self.diffusion_model,
                self.source,
                self.diffusion_model.dtype,
                device,
                lambda done, total: bar.update_absolute(round(100 * done / total)),
                lambda index: stream.lay(index) if index in stream.streamed else None,
                page_lock,
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
        self.diffusion_model.weights = RESIDENT
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
