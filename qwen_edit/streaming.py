"""A transformer on a card that can't hold all of it: some blocks stay in RAM and come to the card for their turn.

The blocks that are streamed lie in page-locked RAM, each in one piece, and take turns in two buffers on the card. While a
block computes, a stream of its own copies the next one into the other buffer; after the last one comes the first, for the
next forward. Events order the two streams, so the host never waits. In its turn a block's parameters are views of the
buffer, laid out as they are in RAM: queries, keys and values side by side, so that one product runs all three. Between
forwards every module has its own parameters back, wherever they were.

On a CPU the same code runs without streams and events.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .host_memory import HostMemory
from .quantize import QuantizedTensor, StaysInRam

BUFFERS = 2
ALIGNMENT = 16  # bytes; what the cards' products ask for
# Linears over one input, in the order of their results.
SIDE_BY_SIDE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


def spread(count: int, chosen: int) -> tuple[int, ...]:
    """``chosen`` of ``count`` indices, as evenly as they go around, so that each copy has as much time as the others."""
    return tuple((2 * i + 1) * count // (2 * chosen) for i in range(chosen))


def streamed_blocks(sizes: Sequence[int], room: float) -> tuple[int, ...]:
    """Which blocks have to be streamed so that the others and the buffers fit; none if all fit.

    Args:
        sizes: of the blocks, in bytes.
        room: on the card for blocks, in bytes.
    """
    if sum(sizes) <= room:
        return ()
    for count in range(1, len(sizes)):
        chosen = spread(len(sizes), count)
        resident = sum(sizes) - sum(sizes[i] for i in chosen)
        if resident + BUFFERS * max(sizes[i] for i in chosen) <= room:
            return chosen
    return tuple(range(len(sizes)))


@dataclass(frozen=True)
class _Part:
    """A plain tensor of a parameter (a quantized weight has two or three), and where it lies in its block's buffer."""

    parameter: int
    name: str  # of the field; "" where the parameter is plain itself
    tensor: torch.Tensor
    offset: int

    def view(self, buffer: torch.Tensor, offset: int) -> torch.Tensor:
        flat = buffer[offset : offset + self.tensor.nbytes]
        return flat.view(self.tensor.dtype).view(self.tensor.shape)


class _Contents:
    """A block's parameters as they are now, but those that stay in RAM, and their places in a buffer."""

    def __init__(self, block: nn.Module):
        named = dict(block.named_modules())
        modules = [*(m for name in SIDE_BY_SIDE if (m := named.pop(name, None)) is not None), *named.values()]
        self.homes: list[tuple[dict, str, Any]] = [
            (module._parameters, name, parameter)
            for module in modules
            if not isinstance(module, StaysInRam)
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self.parts: list[_Part] = []
        self.nbytes = 0
        found = [
            (what, number, tensor)
            for number, (_, _, parameter) in enumerate(self.homes)
            for what, tensor in _tensors(parameter).items()
        ]
        # weights first, then what belongs to them: equal parts of linears side by side have to touch
        for what, number, tensor in sorted(found, key=lambda entry: (_small(entry[2]), entry[0])):
            self.parts.append(_Part(number, what, tensor, self.nbytes))
            self.nbytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT

    def made_of(self, tensors: dict[tuple[int, str], torch.Tensor]) -> list[nn.Parameter]:
        """The parameters over other tensors, by parameter and field; those not given stay."""
        made = []
        for number, (_, _, parameter) in enumerate(self.homes):
            fields = {what: tensors.get((number, what), tensor) for what, tensor in _tensors(parameter).items()}
            same = all(fields[what] is tensor for what, tensor in _tensors(parameter).items())
            made.append(parameter if same else _like(parameter, fields))
        return made

    def in_buffer(self, buffer: torch.Tensor) -> list[nn.Parameter]:
        return self.made_of({(p.parameter, p.name): p.view(buffer, p.offset) for p in self.parts})

    def put(self, parameters: Sequence[nn.Parameter]) -> None:
        for (owner, name, _), parameter in zip(self.homes, parameters, strict=True):
            owner[name] = parameter

    def put_back(self) -> None:
        for owner, name, parameter in self.homes:
            owner[name] = parameter

    def pieces(self) -> list[tuple[int, torch.Tensor]]:
        """What has to be copied where, as bytes in RAM; parts that lie there as they will in the buffer in one piece."""
        pieces: list[tuple[int, int, torch.Tensor, int]] = []  # offset, size, first part, its address
        for part in self.parts:
            address, end = part.tensor.data_ptr(), part.offset + part.tensor.nbytes
            if pieces:
                offset, _, first, start = pieces[-1]
                same = first.untyped_storage().data_ptr() == part.tensor.untyped_storage().data_ptr()
                if same and address - start == part.offset - offset:
                    pieces[-1] = (offset, end - offset, first, start)
                    continue
            pieces.append((part.offset, end - part.offset, part.tensor, address))
        return [(offset, _bytes(first, size)) for offset, size, first, _ in pieces]


def _tensors(parameter: Any) -> dict[str, torch.Tensor]:
    if not isinstance(parameter, QuantizedTensor):
        return {"": parameter}
    params = parameter._params
    return {"": parameter._qdata} | {name: getattr(params, name) for name in params._tensor_fields()}


def _small(tensor: torch.Tensor) -> bool:
    return tensor.ndim < 2 or tensor.shape[-1] == 1


def _like(parameter: Any, fields: dict[str, torch.Tensor]) -> nn.Parameter:
    if not isinstance(parameter, QuantizedTensor):
        return nn.Parameter(fields[""], requires_grad=False)
    params = replace(parameter._params, **{name: tensor for name, tensor in fields.items() if name})
    made: Any = nn.Parameter(QuantizedTensor(fields[""], parameter._layout_cls, params), requires_grad=False)
    made._params = params  # Parameter has copied the scales
    return made


def _bytes(first: torch.Tensor, nbytes: int) -> torch.Tensor:
    start = first.storage_offset() * first.itemsize
    return torch.empty(0, dtype=torch.uint8).set_(first.untyped_storage(), start, (nbytes,), (1,))


class _Buffer:
    """Memory on the card that blocks take in turn, and when it is full and free again."""

    def __init__(self, nbytes: int, device: torch.device, copies: Any):
        with torch.inference_mode(False):  # or only in that mode could it be filled again
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._copies = copies
        if copies is not None:
            self._filled, self._free = torch.cuda.Event(), torch.cuda.Event()
            self.memory.record_stream(copies)
            self.done()

    def fill(self, pieces: Iterable[tuple[int, torch.Tensor]]) -> None:
        if self._copies is not None:
            self._copies.wait_event(self._free)
        with contextlib.nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            for offset, piece in pieces:
                self.memory[offset : offset + len(piece)].copy_(piece, non_blocking=True)
            if self._copies is not None:
                self._filled.record(self._copies)

    def wait(self) -> None:
        """What is computed from now on sees what was filled in."""
        if self._copies is not None:
            torch.cuda.current_stream(self.memory.device).wait_event(self._filled)

    def done(self) -> None:
        """What was computed so far is the last to need it."""
        if self._copies is not None:
            self._free.record(torch.cuda.current_stream(self.memory.device))


@dataclass
class _Streamed:
    """A block that is streamed: what it holds in RAM, and its parameters in each buffer."""

    contents: _Contents
    pieces: list[tuple[int, torch.Tensor]]
    in_buffer: dict[int, list[nn.Parameter]] = field(default_factory=dict)


class BlockStream:
    """Brings the blocks that stay in RAM to ``device``, each for its turn. A context manager for one forward.

    Attributes:
        streamed: indices of these blocks, ascending; set by ``choose``.
        copied: bytes that went to the device so far.
    """

    def __init__(self, blocks: nn.ModuleList, memory: HostMemory | None = None):
        self.blocks = blocks
        self.memory = memory or HostMemory()
        self.device = torch.device("cpu")
        self.streamed: tuple[int, ...] = ()
        self.copied = 0
        self._copies: Any = None  # torch.cuda.Stream
        self._buffers: list[_Buffer] = []
        self._known: dict[int, _Streamed] = {}
        self._ahead: deque[tuple[int, int]] = deque()  # block and buffer, in the order of their copies
        self._current: tuple[int, int] | None = None

    def choose(self, streamed: Sequence[int], device: torch.device) -> None:
        """From now on these blocks are streamed to ``device``; the others are the caller's to move."""
        self.close()
        self.streamed, self.device = tuple(streamed), torch.device(device)
        self._copies = None

    @torch.no_grad()
    def lay(self, index: int) -> None:
        """Move a block's parameters into memory of ours in RAM; those that are there stay."""
        contents = _Contents(self.blocks[index])
        missing = [part for part in contents.parts if not self.memory.holds(part.tensor)]
        if not missing:
            return
        sizes = [-(-part.tensor.nbytes // ALIGNMENT) * ALIGNMENT for part in missing]
        memory, offset, moved = self.memory.allocate(sum(sizes)), 0, {}
        for part, size in zip(missing, sizes, strict=True):
            moved[part.parameter, part.name] = part.view(memory, offset).copy_(part.tensor)
            offset += size
        contents.put(contents.made_of(moved))

    def open(self) -> None:
        """Take the buffers, so that the first forward does not have to; after ``choose`` and whenever they were closed."""
        if self._buffers or not self.streamed:
            return
        if self.device.type == "cuda" and self._copies is None:
            self._copies = torch.cuda.Stream(self.device)
        size = max(self._block(index).contents.nbytes for index in self.streamed)
        self._buffers = [_Buffer(size, self.device, self._copies) for _ in range(min(BUFFERS, len(self.streamed)))]

    def close(self) -> None:
        """Give the buffers back. The next forward takes them again."""
        self.reset()
        self._buffers.clear()

    def reset(self) -> None:
        """Forget what was read ahead; the weights change, or leave."""
        if self._copies is not None:
            self._copies.synchronize()  # the memory that is being copied may be freed next
        self._ahead.clear()
        self._known.clear()

    def bandwidth(self) -> float | None:
        """Bytes a second of copies to the device, measured with one block; waits for it. None without a card."""
        if self._copies is None:
            return None
        self.reset()
        pieces, buffer = self._block(self.streamed[0]).pieces, self._buffers[0]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for mark in marks:
            buffer.fill(pieces)  # the first time is not counted
            mark.record(self._copies)
        self._copies.synchronize()
        return sum(len(piece) for _, piece in pieces) / marks[0].elapsed_time(marks[1]) * 1000

    @property
    def before_block(self) -> Callable[[int], None] | None:
        """``before``, if there is anything to stream."""
        return self.before if self.streamed else None

    @property
    def buffer_bytes(self) -> int:
        return sum(buffer.memory.nbytes for buffer in self._buffers)

    @property
    def bytes_per_forward(self) -> int:
        return sum(self._block(index).contents.nbytes for index in self.streamed)

    def __enter__(self):
        self.open()
        return self

    def __exit__(self, kind, *_):
        self._leave(go_on=kind is None)
        if kind is not None:  # the next forward starts at the first block again
            self._ahead.clear()

    def before(self, index: int) -> None:
        """Put back the block before this one, have the next one copied, and give block ``index`` its parameters."""
        self._leave(go_on=True)
        if index not in self.streamed:
            return
        if not self._ahead or self._ahead[0][0] != index:
            self._ahead.clear()
            for buffer in self._buffers:
                buffer.done()  # whatever was interrupted may still be computing with it
            self._read_ahead(index)
        _, number = self._ahead.popleft()
        block, buffer = self._block(index), self._buffers[number]
        buffer.wait()
        if number not in block.in_buffer:
            block.in_buffer[number] = block.contents.in_buffer(buffer.memory)
        self._current = index, number
        block.contents.put(block.in_buffer[number])

    def _following(self, index: int) -> int:
        return self.streamed[(self.streamed.index(index) + 1) % len(self.streamed)]

    def _read_ahead(self, index: int) -> None:
        """Have blocks copied, this one first, into every buffer that is free."""
        while len(self._ahead) < len(self._buffers):
            used = [number for _, number in self._ahead]
            number = next(n for n in range(len(self._buffers)) if n not in used)
            block = self._block(index)
            self._buffers[number].fill(block.pieces)
            self.copied += sum(len(piece) for _, piece in block.pieces)
            self._ahead.append((index, number))
            index = self._following(index)

    def _leave(self, *, go_on: bool) -> None:
        """The current block's turn is over; its buffer is filled again if the forward goes on."""
        if self._current is not None:
            index, number = self._current
            self._current = None
            self._known[index].contents.put_back()
            self._buffers[number].done()
            if go_on:
                self._read_ahead(self._following(self._ahead[-1][0] if self._ahead else index))

    def _block(self, index: int) -> _Streamed:
        if index not in self._known:
            self.lay(index)
            contents = _Contents(self.blocks[index])
            self._known[index] = _Streamed(contents, contents.pieces())
        return self._known[index]
