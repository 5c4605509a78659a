"""Small work beside large work: the text stream of a block on a CUDA stream of its own.

A prompt's few hundred tokens read as many weights as the picture's thousands but fill only a part of the card, so on their
own they cost several times what they cost beside the picture's products. Results are the same bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LEAST_TOKENS = 2048  # of the picture: below, the host has no time to spare for two streams


class SideStream:
    """One for each device; ``None`` where there is no second stream."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device, priority=-1)  # so that it does not wait behind the large work

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """What is started inside runs beside what is started until ``join``; it sees everything started before."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Everything started from now on sees what ran beside. Memory that both used may be let go only after this."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class OneStream:
    """No second stream: one after the other."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        yield

    def join(self) -> None:
        pass


ONE_STREAM = OneStream()
_side_streams: dict[torch.device, SideStream] = {}


def side_stream(device: torch.device, tokens: int) -> SideStream | OneStream:
    """For a forward with this many picture tokens."""
    if device.type != "cuda" or tokens < LEAST_TOKENS:
        return ONE_STREAM
    if device not in _side_streams:
        _side_streams[device] = SideStream(device)
    return _side_streams[device]
