"""Fused LoRAs and the pool on the real server: the picture of resident ones, and no trace afterwards."""

import os
import re
import shutil

import numpy as np
import pytest
from comfy_client import ExecutionFailed
from comfy_host import REPO
from comfy_process import run_in_comfyui
from edits import changed, edited, fresh, note, run_fresh, small_edit
from graphs import node
from safetensors.torch import save_file
from test_faults import interrupt_at_step, switch_inputs
from test_lora import loha_state, lora_state

pytestmark = pytest.mark.server

SKETCH, FILM = "qwen_edit_demo_pencil_sketch.safetensors", "qwen_edit_demo_warm_film.safetensors"


@pytest.fixture(scope="module", autouse=True)
def lora_files(models):
    for name in (SKETCH, FILM):
        shutil.copy(REPO / "demo_model" / "loras" / name, models / "loras" / name)


@pytest.fixture(scope="module")
def graph(server):
    from array_client import ArrayClient

    with ArrayClient(server.url) as client:
        return small_edit(client)


def switched(graph, name: str, mode: str, strength: float = 1.0, model: str = "loader") -> dict:
    graph = dict(graph)
    graph["switch"] = node("QwenEditLoraSwitch", model=[model, 0], mode=mode, **switch_inputs(name, strength))
    return changed(graph, "sampler", model=["switch", 0])


@pytest.fixture(scope="module")
def resident(server, graph) -> dict[str | None, np.ndarray]:
    """The pictures without a LoRA and with each beside the weights."""
    from array_client import ArrayClient

    with ArrayClient(server.url) as client:
        found = {name: edited(client, switched(graph, name, "resident")) for name in (SKETCH, FILM)}
        return found | {None: edited(client, graph)}


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return np.abs(a - b).max() <= 2 / 255


def test_switching_while_prompts_are_queued(client, graph, resident):
    """Both LoRAs in the weights, beside them, and none, in one queue: everyone gets its own picture, to the bit."""
    order = [(SKETCH, "fused"), (FILM, "fused"), (SKETCH, "resident"), (None, ""), (FILM, "fused"), (SKETCH, "fused")]
    prompts = [client.queue(fresh(switched(graph, name, mode) if name else graph)) for name, mode in order]
    results = [client.wait(prompt, timeout_s=240) for prompt in prompts]
    pictures = [client.arrays(result)[0] for result in results]
    for (name, mode), picture in zip(order, pictures, strict=True):
        same = close if mode == "fused" else np.array_equal
        assert same(picture, resident[name]), (name, mode)
    assert np.array_equal(pictures[0], pictures[5])
    assert np.array_equal(pictures[1], pictures[4])
    assert np.abs(resident[SKETCH] - resident[FILM]).max() > 5 / 255
    assert "fused: in the weights; the originals are kept on the card." in note(results[0], "switch")


def test_two_branches_of_one_graph(client, graph, resident):
    both = switched(graph, SKETCH, "fused")
    both["switch2"] = switched(graph, FILM, "fused")["switch"]
    for name, model in (("2", "switch2"), ("3", "loader")):
        both[f"sampler{name}"] = node("QwenEditSampler", **graph["sampler"]["inputs"] | {"model": [model, 0]})
        both[f"decode{name}"] = node("VAEDecode", samples=[f"sampler{name}", 0], vae=["loader", 2])
        both[f"save{name}"] = node("SaveImage", images=[f"decode{name}", 0], filename_prefix="fused")
    result = run_fresh(client, both)
    pictures = {ref.node: array for ref, array in zip(result.images(), client.arrays(result), strict=True)}
    assert close(pictures["save"], resident[SKETCH])
    assert close(pictures["save2"], resident[FILM])
    assert np.array_equal(pictures["save3"], resident[None])


def test_an_interrupt_leaves_everything_as_it_was(client, graph, resident):
    fused = switched(graph, SKETCH, "fused")
    before = edited(client, fused)
    long = changed(changed(fused, "sampler", steps=40), "encode", width=384, height=384)
    interrupt_at_step(client, long, 2)
    assert np.array_equal(edited(client, graph), resident[None])
    assert np.array_equal(edited(client, fused), before)
    client.free()
    assert np.array_equal(edited(client, graph), resident[None])


def test_on_top_of_comfyuis_own_loader(client, graph, resident):
    """Its patches come before ours and go after them."""
    native = dict(graph)
    native["native"] = node("LoraLoaderModelOnly", model=["loader", 0], lora_name=FILM, strength_model=0.8)
    native = changed(native, "sampler", model=["native", 0])
    alone = edited(client, native)
    beside = edited(client, switched(native, SKETCH, "resident", model="native"))
    fused = switched(native, SKETCH, "fused", model="native")
    first = edited(client, fused)
    assert close(first, beside)
    assert not close(alone, beside)
    assert np.array_equal(edited(client, native), alone)
    assert np.array_equal(edited(client, fused), first)
    assert np.array_equal(edited(client, graph), resident[None])


def test_eight_bits_say_that_they_are_rounded(client, graph):
    fp8 = changed(graph, "loader", precision="fp8")
    without = edited(client, fp8)
    beside = edited(client, switched(fp8, SKETCH, "resident"))
    result = run_fresh(client, switched(fp8, SKETCH, "fused"))
    (fused,) = client.arrays(result)
    assert "rounded once more" in note(result, "switch")
    assert np.abs(fused - beside).mean() < 0.3 * np.abs(beside - without).mean()
    assert "auto: beside the weights" in note(run_fresh(client, switched(fp8, SKETCH, "auto")), "switch")
    assert np.array_equal(edited(client, fp8), without)


@pytest.mark.parametrize(("loader", "reason"), [({"offload": "stream"}, "streamed"), ({"precision": "w4a4"}, "w4a4")])
def test_where_it_is_not_possible_they_stay_beside(client, graph, loader, reason):
    graph = changed(graph, "loader", **loader)
    result = run_fresh(client, switched(graph, SKETCH, "fused"))
    assert re.search(f"fused is not possible here, because .*{reason}", note(result, "switch"))
    assert np.array_equal(client.arrays(result)[0], edited(client, switched(graph, SKETCH, "resident")))


def test_auto_fuses_what_is_long_enough(client, server, graph, models):
    save_file(lora_state(3), models / "loras" / "auto.safetensors")
    wide = {}
    for key, value in lora_state(3).items():  # rank 4, 64 times over
        wide[key] = value.repeat(64, 1) / 8 if "lora_A" in key else value.repeat(1, 64) / 8
    save_file(wide, models / "loras" / "auto wide.safetensors")
    # 12 steps x rank 256 x 256 tokens are above fused_lora.PAYS_FROM, 12 x 4 x 256 below
    long = changed(changed(graph, "sampler", steps=12), "encode", width=256, height=256)

    def times_fused() -> int:
        return server.log.read_text(errors="replace").count("LoRAs are in the weights now")

    before = times_fused()
    edited(client, switched(long, "auto.safetensors", "auto"))
    assert times_fused() == before
    in_them = edited(client, switched(long, "auto wide.safetensors", "auto"))
    assert times_fused() == before + 1
    assert close(in_them, edited(client, switched(long, "auto wide.safetensors", "resident")))


def test_the_next_edit_finds_them_in_the_weights(client, server, graph):
    def times_fused() -> int:
        return server.log.read_text(errors="replace").count("LoRAs are in the weights now")

    first = edited(client, switched(graph, SKETCH, "fused", strength=0.875))
    before = times_fused()
    assert np.array_equal(edited(client, switched(graph, SKETCH, "fused", strength=0.875)), first)
    assert times_fused() == before


def test_a_product_of_high_rank_needs_the_weights(client, graph, resident, models):
    save_file(loha_state(rank=32), models / "loras" / "high.safetensors")
    with pytest.raises(ExecutionFailed, match=r"\[QE_LORA\] high.*rank above 256.*Choose mode auto or fused"):
        client.run(switched(graph, "high.safetensors", "resident"))
    native = dict(graph)
    native["native"] = node(
        "LoraLoaderModelOnly", model=["loader", 0], lora_name="high.safetensors", strength_model=1.0
    )
    expected = edited(client, changed(native, "sampler", model=["native", 0]))
    assert close(edited(client, switched(graph, "high.safetensors", "auto")), expected)
    assert np.array_equal(edited(client, graph), resident[None])


def test_an_unknown_mode_is_refused(client, graph):
    linked = switched(graph, SKETCH, "fused")
    linked["switch"]["inputs"]["mode"] = ["text", 0]
    linked["text"] = node("ProbeText", text="molten")
    with pytest.raises(ExecutionFailed, match=r"\[QE_INPUT\] mode is 'molten'"):
        client.run(linked)


# The pool


def times_read(server, name: str) -> int:
    return server.log.read_text(errors="replace").count(f"reading the LoRA {name}")


def test_a_file_is_read_once_and_again_when_it_changes(client, server, graph, models):
    path = models / "loras" / "pooled.safetensors"
    save_file(lora_state(11), path)
    one = switched(graph, path.name, "resident")
    first = edited(client, one)
    ahead = switched(graph, path.name, "resident", strength=0.0)
    for again in (ahead, one, switched(graph, path.name, "fused"), one):
        result = run_fresh(client, again)
        assert re.search(r"resident: \d", note(result, "switch"))
    assert np.array_equal(client.arrays(result)[0], first)
    assert times_read(server, path.name) == 1
    stat = path.stat()
    save_file(lora_state(12), path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 2_000_000_000))
    assert not close(edited(client, one), first)
    assert times_read(server, path.name) == 2


POOL = """
import os
import comfy.model_management
from pack.nodes.host import lora
from pack.nodes.host.lora import POOL, LoraTarget, resident
from pack.qwen_edit.checkpoints import transformer_from_folder
from server import PromptServer
from types import SimpleNamespace

PromptServer.instance = SimpleNamespace(prompt_queue=SimpleNamespace(currently_running=True))
target = LoraTarget(dict(transformer_from_folder(Path(DEMO)).config), torch.float32)
paths = sorted(Path(FOLDER).glob("*.safetensors"))
size = resident(paths[0], target)[0].model_size()
comfy.model_management.total_ram = 2.5 * size / lora.SHARE_OF_RAM / 2**20
comfy.model_management.get_total_memory = lambda *_: 1e12
shells = {}
for number in (0, 1, 0, 2, 0, 1):
    patcher, was_resident = resident(paths[number], target)
    shells[number] = patcher.model
    held = sorted(int(p.model.path.stem) for p in POOL.things())
    print(number, was_resident, held, [n for n, shell in sorted(shells.items()) if not shell.is_empty])
print(lora.pool_line(), flush=True)
os._exit(0)  # ComfyUI's own modules do not always end by themselves
"""


def test_what_was_used_longest_ago_leaves(host, tmp_path):
    for seed in range(3):
        save_file(lora_state(seed), tmp_path / f"{seed}.safetensors")
    constants = f"DEMO, FOLDER = {str(REPO / 'demo_model')!r}, {str(tmp_path)!r}\n"
    *lines, pool = run_in_comfyui(host, constants + POOL).splitlines()[-7:]
    assert lines == [
        "0 True [0] [0]",
        "1 False [0, 1] [0, 1]",
        "0 True [0, 1] [0, 1]",
        "2 False [0, 2] [0, 2]",
        "0 True [0, 2] [0, 2]",
        "1 False [0, 1] [0, 1]",
    ]
    assert pool.startswith("2 resident: ")
