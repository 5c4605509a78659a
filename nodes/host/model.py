"""Our transformer as a MODEL of ComfyUI: a ``QwenImage`` whose ``diffusion_model`` is diffusers' transformer."""

import logging

import comfy.latent_formats
import comfy.ldm.common_dit
import comfy.model_base
import comfy.model_management
import comfy.patcher_extension
import comfy.supported_models
import comfy.utils
import torch

from ...qwen_edit.attention import KernelChoice
from ...qwen_edit.checkpoints import TransformerSource, check_tensors, fill
from ...qwen_edit.errors import INPUT
from ...qwen_edit.rope import Positions
from ...qwen_edit.streaming import BlockStream
from ...qwen_edit.transformer import QwenEditTransformer, denoise
from .lora import active_adapters
from .memory import ShellPatcher
from .streaming import StreamingPatcher

POSITIONS = "qwen_edit_positions"  # key in transformer_options; ComfyUI's own when absent, as for any MODEL
REFERENCE_METHODS = ("index", "index_timestep_zero")


class HostTransformer(QwenEditTransformer):
    """The engine's transformer with ComfyUI's calling convention."""

    attention: KernelChoice
    streamed = False  # whether the blocks stay in RAM between their turns

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
        _refuse_what_is_not_honoured(x, control, additional_t_cond, ref_latents_method, transformer_options)
        width = self.config.joint_attention_dim
        if context.shape[-1] != width:
            raise ValueError(
                f"{INPUT} The conditioning is {context.shape[-1]} wide, this model needs {width}: it was made with the text"
                " encoder of another model."
            )
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask >= 0  # ComfyUI's additive masks: 0 attends, hugely negative hides
        references = ref_latents or []
        tokens, grids = zip(*(_pack(latents) for latents in (x, *references)), strict=True)
        with BlockStream(self.transformer_blocks, x.device) as stream:
            velocity = denoise(
                self,
                torch.cat(tokens, dim=1),
                timesteps,
                context,
                grids,
                attend=self.attention.attend,
                positions=transformer_options.get(POSITIONS, "comfyui"),
                text_mask=attention_mask,
                zero_cond_t=None if ref_latents_method is None else ref_latents_method == "index_timestep_zero",
                adapters=active_adapters(self, transformer_options),
                before_block=stream.before if self.streamed else None,
            )
        return _unpack(velocity, grids[0], x.shape)


def _refuse_what_is_not_honoured(x, control, additional_t_cond, method, transformer_options) -> None:
    problems = []
    if control is not None:
        problems.append("a ControlNet")
    problems += [f"{kind} patches" for kind, patches in transformer_options.get("patches", {}).items() if patches]
    if any(transformer_options.get("patches_replace", {}).values()):
        problems.append("replaced blocks or attention")
    if "optimized_attention_override" in transformer_options:
        problems.append("an attention override (choose the attention on the loader instead)")
    if additional_t_cond is not None:
        problems.append("additional timestep conditioning")
    if method is not None and method not in REFERENCE_METHODS:
        problems.append(f"the reference method {method!r} (it knows {' and '.join(REFERENCE_METHODS)})")
    if problems:
        raise ValueError(
            f"{INPUT} This MODEL comes from QwenEditLoader, whose forward does not support {', '.join(problems)}. Remove"
            " it, or load the model with ComfyUI's own loader."
        )
    if x.ndim != 5 or x.shape[2] != 1:
        raise ValueError(
            f"{INPUT} The latents are {list(x.shape)}; this model edits pictures: [B, 16, 1, height/8, width/8]."
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

    def __init__(
        self,
        source: TransformerSource,
        dtype: torch.dtype,
        latent_format,
        attention: KernelChoice,
        stream: bool,
    ):
        config = comfy.supported_models.QwenImage(
            {"image_model": "qwen_image", "disable_unet_model_creation": True, "dtype": dtype}
        )
        config.latent_format = latent_format
        super().__init__(config)
        self.source = source
        with torch.device("meta"):
            transformer = HostTransformer.from_config(dict(source.config)).eval()
        check_tensors(transformer, source)
        # diffusers' own .to warns about layers to keep in float32; this model has none.
        self.diffusion_model = torch.nn.Module.to(transformer, dtype)
        self.diffusion_model.requires_grad_(False)
        self.diffusion_model.attention = attention
        self.diffusion_model.streamed = stream

    @property
    def is_empty(self) -> bool:
        return self.diffusion_model.img_in.weight.is_meta

    def fill(self, device: torch.device) -> None:
        logging.info("Qwen Edit Fast: reading the transformer of %s", self.source.label)
        bar = comfy.utils.ProgressBar(100)
        fill(
            self.diffusion_model,
            self.source,
            self.diffusion_model.dtype,
            device,
            lambda done, total: bar.update_absolute(round(100 * done / total)),
        )

    def empty(self) -> None:
        torch.nn.Module.to(self.diffusion_model, "meta")


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
    dtype: torch.dtype,
    statistics: dict | None,
    attention: KernelChoice,
    *,
    stream: bool = False,
    keep_on_card: bool = False,
) -> ShellPatcher:
    """A MODEL whose weights are read when it is first used.

    Args:
        stream: the blocks stay in RAM between their turns.
        keep_on_card: what ComfyUI unloads stays on the card, as with its --highvram.
    """
    model = QwenEditModel(source, dtype, latent_format(statistics), attention, stream)
    card = comfy.model_management.get_torch_device()
    if stream:  # the CPU, whatever ComfyUI's --highvram says
        return StreamingPatcher(model, load_device=card, offload_device=torch.device("cpu"))
    away = card if keep_on_card else comfy.model_management.unet_offload_device()
    return ShellPatcher(model, load_device=card, offload_device=away)


def with_positions(model, positions: Positions):
    """A clone whose forward counts token positions as diffusers or as ComfyUI does."""
    clone = model.clone()
    clone.model_options["transformer_options"][POSITIONS] = positions
    return clone
