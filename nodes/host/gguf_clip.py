"""A text encoder in GGUF as ComfyUI's CLIP: ComfyUI's own modules, whose weights stay in ggml's blocks."""

from contextlib import closing
from pathlib import Path

import comfy.ops
import comfy.sd
import folder_paths
import torch
import torch.nn.functional as F
from comfy.text_encoders.qwen_image import QwenImageTEModel, QwenImageTokenizer
from torch import nn

from ...qwen_edit.blocks import BlockType, dequantize, packed_shape
from ...qwen_edit.errors import INPUT
from ...qwen_edit.gguf_encoder import EncoderSource, check_encoder, encoder_source, read_encoder
from ...qwen_edit.packed import patchers_copy
from .clip import shell_clip
from .memory import ShellPatcher
from .pinning import page_lock


class _Packed:
    """What a module with a packed ``weight`` needs so that ComfyUI's patcher can change it, to floats, and restore it."""

    kind: BlockType | None = None  # of the weight while it is packed
    shape: torch.Size
    weight: nn.Parameter

    # With DynamicVRAM ComfyUI's layers have no weights until it loads them itself. It asks for this to tell whose they are.
    _load_from_state_dict = nn.Module._load_from_state_dict

    def keep_packed(self, kind: BlockType) -> None:
        self.kind, self.shape = kind, self.weight.shape
        packed = torch.empty(packed_shape(self.shape, kind), dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)

    @property
    def is_packed(self) -> bool:
        return self.weight.dtype == torch.uint8

    def values(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Of some rows of the weight, ``[n, K]``."""
        assert self.kind is not None
        return dequantize(rows, self.kind, dtype)

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **_) -> torch.Tensor:
        return weight if self.kind is None else patchers_copy(weight, self.kind)

    def set_weight(self, weight: torch.Tensor, return_weight: bool = False, **_) -> torch.Tensor | None:
        if return_weight:
            return weight
        self.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
        return None


class PackedOps(comfy.ops.manual_cast):
    """ComfyUI's layers; linears and embeddings can keep their weights in ggml's blocks, each made float when it is used."""

    class Linear(_Packed, comfy.ops.manual_cast.Linear):
        def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            if not self.is_packed:
                return super().forward(x, *args, **kwargs)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.values(self.weight, x.dtype), bias)

    class Embedding(_Packed, comfy.ops.manual_cast.Embedding):
        def forward(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
            if not self.is_packed:
                return super().forward(x, out_dtype=out_dtype)
            rows = self.weight[x.flatten()]
            return self.values(rows, out_dtype or torch.float32).view(*x.shape, -1)


class GgufTextModel(QwenImageTEModel):
    """ComfyUI's text encoder of Qwen-Image as a shell (see ``memory.py``)."""

    def __init__(self, source: EncoderSource):
        """
        Raises:
            ValueError: the files are another model's.
        """
        super().__init__(device="meta", dtype=torch.float32, model_options={"custom_operations": PackedOps})
        self.source = source
        self.device: torch.device | None = None
        names = {name: tensor.shape for name, tensor in self._encoder.state_dict().items()}
        check_encoder(source, names)
        self._names = tuple(names)
        self._packed: list[str] = []
        for name, module in self._encoder.named_modules():
            weight = f"{name}.weight"
            kind = source.kind(weight) if weight in names else None
            if isinstance(module, _Packed) and kind is not None and names[weight][-1] % kind.values == 0:
                module.keep_packed(kind)
                self._packed.append(weight)
        for name, parameter in self._encoder.named_parameters():
            if name not in self._packed:  # what the weights will be tells in what the encoder computes
                parameter.data = parameter.data.to(source.dtype(name))

    @property
    def _encoder(self) -> nn.Module:  # an attribute would be a second module of the same weights
        return self.qwen25_7b.transformer

    @property
    def is_empty(self) -> bool:
        return next(self._encoder.parameters()).is_meta

    def fill(self, device: torch.device) -> None:
        try:
            with closing(read_encoder(self.source, self._names, self._packed, device, page_lock)) as tensors:
                for name, tensor in tensors:
                    module, _, parameter = name.rpartition(".")
                    setattr(self._encoder.get_submodule(module), parameter, nn.Parameter(tensor, requires_grad=False))
        except BaseException:  # half of them are no encoder: the next load reads all
            self.empty()
            raise

    def empty(self) -> None:
        self._encoder.to("meta")


class GgufPatcher(ShellPatcher):
    """A shell's, for weights in blocks, which ComfyUI's saving nodes would write as the bytes that they are."""

    def model_state_dict_for_saving(self, model=None, prefix=""):
        """
        Raises:
            ValueError: always.
        """
        raise ValueError(f"{INPUT} A text encoder in GGUF can't be saved. Copy its two files instead.")


def load_gguf_clip(language: Path, keep_on_card: bool = False) -> comfy.sd.CLIP:
    """A CLIP whose weights are read when it first encodes; what sees pictures lies beside the file.

    Args:
        keep_on_card: what ComfyUI unloads stays where it is, as with its --highvram.

    Raises:
        ValueError: another model, a damaged file, or nothing beside it that sees pictures for it.
    """
    source = encoder_source(language)
    tokenizer = QwenImageTokenizer(embedding_directory=folder_paths.get_folder_paths("embeddings"))
    return shell_clip(GgufTextModel(source), tokenizer, source.nbytes, keep_on_card, GgufPatcher)
