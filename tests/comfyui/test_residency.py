"""How many blocks stay on the card: decided at each load, given back one by one, and never seen in the result.

ComfyUI's manager gives a server on the CPU no budget, so its calls are made here as it makes them on a card.
"""

import json

import pytest
from comfy_host import REPO
from comfy_process import run_in_comfyui

pytestmark = pytest.mark.server

CODE = """
import json
import comfy.model_management
import comfy.sd
import comfy.utils
from pack.nodes.host.model import make_model
from pack.qwen_edit.attention import resolve
from pack.qwen_edit.checkpoints import transformer_from_folder
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
print("RESULT", json.dumps(result))
"""

FORMS = [None, "fp8"]
BLOCKS = 5  # of the demo model
EXPECTED = {
    "first": 3, "less": BLOCKS, "lora": 3, "lora, less": BLOCKS, "lora, all": 0, "without": 3,
    "all": 0, "after": 0, "again": 3, "read again": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def seen(host):
    constants = f"DEMO, FORMS = {str(REPO / 'demo_model')!r}, {json.dumps(json.dumps(FORMS))}\n"
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
