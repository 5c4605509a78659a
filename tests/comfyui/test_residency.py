"""How many blocks stay on the card: decided at each load, given back one by one, and never seen in the result.

ComfyUI's manager gives a server on the CPU no budget, so its calls are made here as it makes them on a card.
"""

import json

import pytest
import torch
from comfy_host import REPO
from comfy_process import run_in_comfyui
from safetensors.torch import save_file

from qwen_edit.quantize import is_modulation
from qwen_edit.transformer import QwenEditTransformer

pytestmark = pytest.mark.server

CODE = """
import json
import comfy.model_management
import comfy.sd
import comfy.utils
from pack.nodes.host import notes
from pack.nodes.host.model import make_model
from pack.qwen_edit.attention import resolve
from pack.qwen_edit.checkpoints import transformer_from_file, transformer_from_folder
from pack.qwen_edit.kernels import REFERENCE
from pack.qwen_edit.precision import Precision
from server import PromptServer
from types import SimpleNamespace

# what a patcher asks before it drops weights: whether a prompt runs
PromptServer.instance = SimpleNamespace(
    prompt_queue=SimpleNamespace(currently_running=True), send_progress_text=lambda *_: None
)
torch.set_num_threads(1)
cpu, fp32 = torch.device("cpu"), torch.float32
source = transformer_from_folder(Path(DEMO))
lora = comfy.utils.load_torch_file(str(Path(DEMO) / "loras" / "qwen_edit_demo_pencil_sketch.safetensors"))
generator = torch.Generator().manual_seed(1)
x, reference = (torch.randn(1, 16, 1, 8, 8, generator=generator) for _ in range(2))
text = torch.randn(1, 9, 128, generator=generator)


def velocity(patcher):
    return patcher.model.diffusion_model(x, torch.tensor([0.6]), text, ref_latents=[reference])


def make(form, **options):
    precision = Precision(form or "fp32", fp32, form, "")
    return make_model(source, precision, None, resolve("pytorch", cpu, fp32, 32), REFERENCE, **options)


def load(patcher, room):
    # as ComfyUI does on a card with this much for the model: what it may take more than it has
    patcher.partially_load(cpu, room - patcher.loaded_size())
    return len(patcher.model.diffusion_model.stream.streamed)


result = {}
with torch.inference_mode():
    for form in json.loads(FORMS):
        whole = make(form)
        load(whole, 1e32)
        plain = velocity(whole)
        patched = comfy.sd.load_lora_for_models(whole, None, lora, 1.0, 0.0)[0]
        load(patched, 1e32)
        with_lora = velocity(patched)

        part = make(form)
        sizes = part.model.sizes
        block, steps = sizes.blocks[0], {}

        def step(name, patcher, room, expected):
            streamed = load(patcher, room)
            stream, size = patcher.model.diffusion_model.stream, patcher.loaded_size()
            same = [torch.equal(velocity(patcher), expected) for _ in range(2)]
            print(name, streamed, same, flush=True)
            on_card = sizes.with_resident(stream.streamed) + stream.buffer_bytes
            steps[name] = [streamed, all(same), size == on_card, size <= max(room, sizes.others + sizes.buffers) * 1.03]

        # room for everything but half a block: the buffers take two, so three are streamed
        most = part.model_size() - block // 2
        step("first", part, most, plain)
        step("less", part, 0.1, plain)
        clone = comfy.sd.load_lora_for_models(part, None, lora, 1.0, 0.0)[0]
        step("lora", clone, most, with_lora)
        step("lora, less", clone, 0.1, with_lora)
        step("lora, all", clone, 1e32, with_lora)
        step("without", part, most, plain)
        step("all", part, 1e32, plain)

        # another model wants room
        before = part.loaded_size()
        freed = part.partially_unload(cpu, block * 2 - block // 2)
        given = [freed >= block * 1.5, before - part.loaded_size() == freed]
        given += [len(part.model.diffusion_model.stream.streamed), torch.equal(velocity(part), plain)]
        given += [part.partially_unload(cpu, 1e32)]  # ComfyUI then detaches it
        step("after", part, 1e32, plain)
        part.detach()
        given += [part.loaded_size()]
        step("again", part, most, plain)
        part.release()
        step("read again", part, most, plain)
        result[str(form)] = {"steps": steps, "given": given}

    kept, forced = make(None, keep_on_card=True), make(None, stream=True)
    result["none"] = [load(kept, 0.1), kept.partially_unload(cpu, 1000)]
    streamed = load(forced, 1e32)
    same = torch.equal(velocity(forced), velocity(kept))
    result["stream"] = [streamed, forced.model_size() >= forced.loaded_size(), same]

# what is said: large blocks of zeros, for numbers that can be told apart
lines = []
notes.say = lines.append
wide = make_model(
    transformer_from_file(Path(ZEROS)), Precision("fp32", fp32, None, ""), None, resolve("pytorch", cpu, fp32, 128), REFERENCE
)
sizes, stream = wide.model.sizes, wide.model.diffusion_model.stream
room = sizes.others + 3.3 * sizes.blocks[0]


def said(room):
    lines.clear()
    load(wide, room)
    return list(lines)


result["said"] = {"all": said(1e32), "part": said(room), "the same again": said(room)}
result["said"] |= {"all again": said(1e32), "and again": said(1e32)}
stream.bandwidth = lambda: 2 * 2**30  # of a card's bus
result["said"]["measured"] = said(room)
stream.device, stream.memory.pageable = torch.device("cuda"), 2**30
result["said"]["pageable"] = [wide._said(room)]
stream.device, stream.memory.pageable = cpu, 0
wide.model.offload = "stream"
result["said"]["asked for"] = said(1e32)
print("RESULT", json.dumps(result))
"""

FORMS = [None, "fp8"]
BLOCKS = 5  # of the demo model
EXPECTED = {
    "first": 3, "less": BLOCKS, "lora": 3, "lora, less": BLOCKS, "lora, all": 0, "without": 3,
    "all": 0, "after": 0, "again": 3, "read again": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def wide() -> QwenEditTransformer:
    with torch.device("meta"):
        shape = dict(num_layers=4, attention_head_dim=128, num_attention_heads=8, joint_attention_dim=128)
        return QwenEditTransformer(**shape)


@pytest.fixture(scope="module")
def seen(host, wide, tmp_path_factory):
    zeros = tmp_path_factory.mktemp("wide") / "zeros 2511.safetensors"
    save_file({name: torch.zeros(tensor.shape) for name, tensor in wide.state_dict().items()}, zeros)
    constants = f"DEMO, FORMS = {str(REPO / 'demo_model')!r}, {json.dumps(json.dumps(FORMS))}\nZEROS = {str(zeros)!r}\n"
    return json.loads(run_in_comfyui(host, constants + CODE, timeout_s=400).split("RESULT", 1)[1])


@pytest.mark.parametrize("form", map(str, FORMS))
def test_blocks_come_and_go_and_the_result_stays(seen, form):
    steps = seen[form]["steps"]
    assert {name: step[0] for name, step in steps.items()} == EXPECTED
    assert [name for name, step in steps.items() if not step[1]] == []


@pytest.mark.parametrize("form", map(str, FORMS))
def test_comfyui_is_told_what_is_on_the_card(seen, form):
    steps = seen[form]["steps"]
    assert [name for name, step in steps.items() if not step[2] or not step[3]] == []


@pytest.mark.parametrize("form", map(str, FORMS))
def test_blocks_are_given_back_one_by_one(seen, form):
    enough, told, streamed, same, refused, left = seen[form]["given"]
    assert enough
    assert told
    assert streamed == 2
    assert same
    assert refused == 0
    assert left == 0


def test_what_the_user_asked_for_is_kept(seen):
    assert seen["stream"] == [BLOCKS, True, True]
    assert seen["none"] == [0, 0]


def gib(module: torch.nn.Module) -> float:
    """Of the weights that go to a card, in fp32."""
    return 4 * sum(p.numel() for name, p in module.named_parameters(prefix="") if not is_modulation(f".{name}")) / 2**30


def test_the_node_says_how_many_blocks_are_streamed_and_what_that_costs(seen, wide):
    said = seen["said"]
    block, whole = gib(wide.transformer_blocks[0]), gib(wide)
    copied = f"3 of the transformer's 4 blocks are streamed from RAM, {3 * block:.2f} GiB in each forward"
    room = f". ComfyUI leaves {whole - 0.7 * block:.1f} GiB of the card for its {whole:.1f} GiB"
    measured = (
        f": {3 * block / 2:.2f} s at the 2 GiB/s measured, while the blocks before them compute; no forward takes less"
    )
    assert said["part"] == said["the same again"] == [f"{copied}{room}."]
    assert said["measured"] == [f"{copied}{measured}{room}."]
    assert said["pageable"][0].startswith(
        f"{copied}{measured}{room}. Warning: 1.0 GiB of them could not be page-locked"
    )
    everything = f"4 of the transformer's 4 blocks are streamed from RAM, {4 * block:.2f} GiB in each forward: "
    assert said["asked for"][0].startswith(everything)
    assert "ComfyUI leaves" not in said["asked for"][0]


def test_nothing_is_said_of_a_transformer_that_is_and_was_on_the_card(seen):
    assert seen["said"]["all"] == seen["said"]["and again"] == []
    assert seen["said"]["all again"] == ["The whole transformer is on the card."]
