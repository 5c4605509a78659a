"""What is page-locked counts in ComfyUI's budget, from whatever thread, and leaves it again.

Page-locking needs a card, so a stand-in for the driver is here.
"""

import json

import pytest
from comfy_process import run_in_comfyui

pytestmark = pytest.mark.server

STAND_IN = """
import json
from concurrent.futures import ThreadPoolExecutor
import comfy.model_management as management
from pack.nodes.host import pinning
from pack.qwen_edit import host_memory

MIB = 2**20
torch.cuda.is_available = lambda: True
management.discard_cuda_async_error = lambda: discarded.append(1)
host_memory.available_memory = lambda: 1000 * MIB
driver, discarded = {}, []


def lock(address, nbytes):
    if address == 13:
        return None
    driver[address] = nbytes
    return lambda: 0 if driver.pop(address) else 1


host_memory.page_lock = lock
management.MAX_PINNED_MEMORY, management.TOTAL_PINNED_MEMORY = 100 * MIB, 10 * MIB


def counted():
    return [management.TOTAL_PINNED_MEMORY // MIB, pinning._locked // MIB, len(management.PINNED_MEMORY), len(driver)]


"""

CODE = """
result = {"before": counted()}
with ThreadPoolExecutor(8) as pool:
    unlocks = list(pool.map(lambda n: pinning.page_lock(1000 + n, 10 * MIB), range(16)))
result["room for eight"] = [sum(u is not None for u in unlocks), *counted()]
blocks = pinning.PinnedBlocks()
block = blocks.allocate(20 * MIB)
result["a block more"] = [blocks.pageable // MIB, *counted()]
for unlock in filter(None, unlocks):
    unlock()
result["given back"] = counted()
second = blocks.allocate(20 * MIB)
result["then it has room"] = [blocks.pageable // MIB, *counted()]
del block, second
result["with its last view"] = [blocks.pageable, *counted()]
result["refused by the driver"] = [pinning.page_lock(13, MIB), len(discarded), *counted()]
management.MAX_PINNED_MEMORY = -1  # --disable-pinned-memory
result["switched off"] = [pinning.page_lock(14, MIB), *counted()]
print("RESULT", json.dumps(result))
"""


def test_what_is_locked_counts_in_comfyuis_budget(host):
    assert json.loads(run_in_comfyui(host, STAND_IN + CODE).split("RESULT", 1)[1]) == {
        "before": [10, 0, 0, 0],
        "room for eight": [8, 90, 80, 8, 8],
        "a block more": [20, 90, 80, 8, 8],
        "given back": [10, 0, 0, 0],
        "then it has room": [20, 30, 20, 1, 1],
        "with its last view": [0, 10, 0, 0, 0],
        "refused by the driver": [None, 1, 10, 0, 0, 0],
        "switched off": [None, 10, 0, 0, 0],
    }


ORIGINALS = """
from pack.nodes.host.fused import PinnedMemory


class OnCard(torch.Tensor):
    is_cuda = True


weight = torch.zeros(10 * MIB // 2, dtype=torch.bfloat16)
originals, result = PinnedMemory(), {}
kept = [originals.like(weight.as_subclass(OnCard)) for _ in range(9)]
result["room for eight"] = counted()
kept.pop(0)
kept.append(originals.like(weight))
result["of a weight in RAM"] = counted()
kept.clear()
result["dropped"] = counted()
host_memory.available_memory = lambda: 20 * MIB - pinning._locked  # what a container has left
kept = [originals.like(weight.as_subclass(OnCard)) for _ in range(2)]
result["the container's limit"] = counted()
print("RESULT", json.dumps(result))
"""


def test_originals_of_weights_with_loras_count_too(host):
    assert json.loads(run_in_comfyui(host, STAND_IN + ORIGINALS).split("RESULT", 1)[1]) == {
        "room for eight": [90, 80, 8, 8],
        "of a weight in RAM": [80, 70, 7, 7],
        "dropped": [10, 0, 0, 0],
        "the container's limit": [20, 10, 1, 1],
    }
