"""Hundreds of edits from two clients at once, all queued before the first is done, and what the server takes for them."""

import re
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil
from array_client import ArrayClient
from comfy_server import ComfyServer
from edits import changed, picture, small_edit
from graphs import Graph

PROMPTS = ("make it black and white", "mirror it")
SEEDS = 5  # of each client; neighbours in the queue differ, so that nothing is answered from ComfyUI's cache
SETTLED = 50  # edits after which memory should be level


@dataclass
class Loaded:
    """What came of it. Memory in MiB, times in seconds."""

    edits: int
    correct: int = 0
    wrong: int = 0
    foreign_events: int = 0
    seconds: float = 0.0
    resident_settled: float = 0.0
    resident_end: float = 0.0
    resident_slope_per_100: float = 0.0
    own_slope_per_100: float = 0.0  # of what no file stands behind, swapped out or not
    files_settled: int = 0
    files_end: int = 0
    samples: list[tuple[float, int, float]] = field(default_factory=list)

    def table(self) -> str:
        values = asdict(self)
        del values["samples"]
        return "\n".join(
            ["| | |", "|---|---|", *(f"| {name.replace('_', ' ')} | {value:g} |" for name, value in values.items())]
        )


def run_load(server: ComfyServer, edits: int, side: int = 128) -> Loaded:
    """Queue ``edits`` edits of 4 steps without guidance from two clients in turn, and check each result and whose it is."""
    outcome = Loaded(edits)
    process = psutil.Process(server.pid)
    lock = threading.Lock()
    with ArrayClient(server.url) as first, ArrayClient(server.url) as second:
        clients = (first, second)
        graphs = [_graphs(client, number, side) for number, client in enumerate(clients)]
        expected = [[client.pictures(graph)[0] for graph in own] for client, own in zip(clients, graphs, strict=True)]
        marks = [len(client.events) for client in clients]
        begin = time.monotonic()
        queued: tuple[list[str], list[str]] = ([], [])
        for number in range(edits):
            who = number % 2
            queued[who].append(clients[who].queue(graphs[who][number // 2 % SEEDS]))

        def follow(who: int) -> None:
            for number, prompt_id in enumerate(queued[who]):
                result = clients[who].wait(prompt_id, timeout_s=120 + 2 * edits)
                arrays = clients[who].arrays(result)
                right = len(arrays) == 1 and np.array_equal(arrays[0], expected[who][number % SEEDS])
                with lock:
                    outcome.correct += right
                    outcome.wrong += not right
                    outcome.samples.append(
                        (process.memory_info().rss / 2**20, process.num_fds(), own_memory(server.pid))
                    )

        threads = [threading.Thread(target=follow, args=(who,)) for who in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        outcome.seconds = round(time.monotonic() - begin, 1)
        for who in (0, 1):
            events = [
                e for e in clients[who].events[marks[who] :] if e.type in ("progress", "progress_state", "executing")
            ]
            outcome.foreign_events += sum(event.data["prompt_id"] not in queued[who] for event in events)
    memory, files, own = (np.array(column) for column in zip(*outcome.samples, strict=True))
    settled = min(SETTLED, edits // 2)
    outcome.resident_settled, outcome.resident_end = (round(float(memory[at]), 1) for at in (settled, -1))
    slopes = [100 * float(np.polyfit(np.arange(settled, edits), one[settled:], 1)[0]) for one in (memory, own)]
    outcome.resident_slope_per_100, outcome.own_slope_per_100 = (round(slope, 2) for slope in slopes)
    outcome.files_settled, outcome.files_end = int(files[settled]), int(files[-1])
    return outcome


def own_memory(pid: int) -> float:
    """MiB of a process that no file stands behind, in RAM or swapped out: unlike what is resident, no other process moves it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(found[1]) for found in re.finditer(r"^(?:RssAnon|VmSwap):\s*(\d+) kB", status, re.MULTILINE)) / 1024


def _graphs(client: ArrayClient, number: int, side: int) -> list[Graph]:
    graph = small_edit(client, picture(number, side, side), prompt=PROMPTS[number], steps=4, true_cfg_scale=1.0)
    return [changed(graph, "sampler", seed=100 * number + seed) for seed in range(SEEDS)]
