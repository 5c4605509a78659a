"""Blocks come to the device one at a time and go back, also after an exception."""

import pytest
import torch

from qwen_edit.streaming import BlockStream

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def blocks() -> torch.nn.ModuleList:
    return torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)) for _ in range(3))


def places(blocks: torch.nn.ModuleList) -> list[set[str]]:
    return [{p.device.type for p in block.parameters()} for block in blocks]


def test_one_block_is_on_the_device_at_a_time(blocks):
    originals = list(blocks.parameters())
    with BlockStream(blocks, ELSEWHERE) as stream:
        for index in range(3):
            stream.before(index)
            assert places(blocks) == [{"meta"} if i == index else {"cpu"} for i in range(3)]
    assert all(now is before for now, before in zip(blocks.parameters(), originals, strict=True))


def test_the_block_goes_back_after_an_exception(blocks):
    def fetch_one_and_one_that_is_not_there():
        with BlockStream(blocks, ELSEWHERE) as stream:
            stream.before(1)
            stream.before(99)

    with pytest.raises(IndexError):
        fetch_one_and_one_that_is_not_there()
    assert places(blocks) == [{"cpu"}] * 3


def test_nothing_moves_when_the_blocks_are_there_already(blocks):
    originals = list(blocks.parameters())
    with BlockStream(blocks, CPU) as stream:
        stream.before(0)
        assert all(now is before for now, before in zip(blocks.parameters(), originals, strict=True))
