"""Prompts and pictures in one pass each against ComfyUI's own path, prompt by prompt: fp32, on the CPU."""

import json

import pytest
from comfy_process import run_in_comfyui
from native_clip import SMALL_NATIVE_CLIP

pytestmark = pytest.mark.server

TOLERANCE = 1e-5  # |ours - ComfyUI's| / |ComfyUI's|
# height and width of each picture, and the prompts; the encoder rounds to multiples of 28, a window is 112
CASES = {
    "no picture": ([], ["grey", " "]),
    "one picture": ([(392, 392)], ["turn the sky into a painting", " "]),
    "smaller than a window": ([(40, 60)], ["grey", ""]),
    "whole windows": ([(224, 112)], ["grey", "a longer negative prompt than the positive one, by far"]),
    "odd sizes": ([(397, 211), (130, 500)], ["put the cup on the table", "blurred"]),
    "three pictures": ([(96, 64), (64, 96), (200, 170)], ["grey", "grey as well"]),
    "the same picture twice": ([(96, 64), (96, 64)], ["swap picture 1 and picture 2", " "]),
    "one prompt": ([(96, 64)], ["alone"]),
    "three prompts": ([(96, 64)], ["red", "red and blue", "green"]),
    "equal prompts": ([(96, 64)], ["red", "red"]),
    "one begins with the other": ([(96, 64)], ["red roses", "red roses and a tulip"]),
    "other writing": ([(96, 64)], ["把天空变成紫色 🌌", "weights (like:1.3) are text"]),
}

CODE = (
    SMALL_NATIVE_CLIP
    + """
import json
from comfy.text_encoders import llama, qwen_vl
from pack.nodes.host import prompts as host
from pack.qwen_edit.text_encoder import EDIT_TEMPLATE, with_pictures

torch.set_num_threads(1)  # thousands of small operations, which threads only slow down
clip = small_native_clip()
text = clip.cond_stage_model.qwen25_7b
result = {}


def tokenize(texts, pictures):
    return [clip.tokenize(with_pictures(t, len(pictures)), images=pictures, llama_template=EDIT_TEMPLATE) for t in texts]


def difference(ours, theirs):
    worst = 0
    for (mine, more), (native, native_more) in ((a[0], b[0]) for a, b in zip(ours, theirs, strict=True)):
        assert mine.shape == native.shape and mine.dtype == native.dtype and mine.device == native.device
        assert more.keys() == native_more.keys() and more["pooled_output"] is native_more["pooled_output"] is None
        worst = max(worst, ((mine - native).norm() / native.norm()).item())
    return worst


class Ops(torch.utils._python_dispatch.TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += 1
        return op(*args, **(kwargs or {}))


def counted(call):
    with Ops() as ops:
        found = call()
    return found, ops.count


with torch.inference_mode():
    for name, (sizes, texts) in CASES.items():
        g = torch.Generator().manual_seed(3)
        pictures = [torch.rand(1, height, width, 3, generator=g) for height, width in sizes]
        if name == "the same picture twice":
            pictures[1] = pictures[0]
        tokens = tokenize(texts, pictures)
        assert host.runs_in_one_pass(clip, tokens)
        theirs, their_ops = counted(lambda: [clip.encode_from_tokens_scheduled(t) for t in tokens])
        ours, our_ops = counted(lambda: host.encode_prompts(clip, tokens, {}))
        result[name] = {"error": difference(ours, theirs), "ops": (their_ops, our_ops)}
        left = vars(text).keys() | vars(text.transformer).keys()
        assert not {"encode", "preprocess_embed"} & left and "load_model" not in vars(clip)

    # bfloat16 activations where a loader asks for them
    tokens = tokenize(["grey", " "], [torch.rand(1, 200, 170, 3)])
    theirs = [clip.encode_from_tokens_scheduled(t) for t in tokens]
    asked = clip.clone()
    asked.patcher.set_attachments(host.ACTIVATIONS, torch.bfloat16)
    result["bfloat16"] = difference(host.encode_prompts(asked, tokens, {}), theirs)
    result["bfloat16 lora clone"] = difference(host.encode_prompts(asked.clone(), tokens, {}), theirs)
    result["float32"] = difference(host.encode_prompts(clip, tokens, {}), theirs)

    # scaled fp8, which ComfyUI's linears undo for each product
    scaled = small_native_clip(fp8=True)
    theirs = [scaled.encode_from_tokens_scheduled(t) for t in tokens]
    result["fp8"] = difference(host.encode_prompts(scaled, tokens, {}), theirs)
    scaled.patcher.set_attachments(host.ACTIVATIONS, torch.bfloat16)
    result["fp8, bfloat16"] = difference(host.encode_prompts(scaled, tokens, {}), theirs)

    # who is asked
    def asks(clip, card=True, bf16=True):
        asked = clip.clone()
        asked.patcher.load_device = torch.device("cuda" if card else "cpu")
        should, comfy.model_management.should_use_bf16 = comfy.model_management.should_use_bf16, lambda device: bf16
        answer = host.ask_for_bfloat16(asked)
        comfy.model_management.should_use_bf16 = should
        assert answer == (asked.patcher.get_attachment(host.ACTIVATIONS) == torch.bfloat16)
        assert clip.patcher.get_attachment(host.ACTIVATIONS) is None
        return answer

    fresh = small_native_clip(fp8=True)
    assert asks(fresh) and not asks(fresh, card=False) and not asks(fresh, bf16=False)
    assert not asks(clip)  # float32 weights
    clip.cond_stage_model.to(torch.float16)
    assert not asks(clip)
    clip.cond_stage_model.to(torch.bfloat16)
    assert asks(clip)
    clip.cond_stage_model.to(torch.float32)

    # what is not plain goes ComfyUI's way
    layer, own = text.transformer, {}
    own["textual inversion"] = tokenize(["grey", " "], [])
    own["textual inversion"][0]["qwen25_7b"][0][-1] = (torch.rand(64), 1.0)
    own["weights"] = tokenize(["grey", " "], [])
    own["weights"][0]["qwen25_7b"][0][-1] = (872, 1.5)
    own["padding"] = tokenize(["grey<|endoftext|>", " "], [])
    for name, tokens in own.items():
        assert not host.runs_in_one_pass(clip, tokens), name
        theirs = [clip.encode_from_tokens_scheduled(t) for t in tokens]
        assert difference(host.encode_prompts(clip, tokens, {}), theirs) == 0, name

    tokens = tokenize(["grey", " "], [])
    replaced = [
        (text, "encode"), (text, "forward"), (text.transformer, "preprocess_embed"), (text.transformer, "forward"),
        (text.transformer.model, "forward"), (text.transformer.visual, "forward"), (llama.Llama2_, "forward"),
    ]
    for owner, method in replaced:
        there, found = method in vars(owner), getattr(owner, method)
        setattr(owner, method, lambda *given, **named: found(*given, **named))
        assert not host.runs_in_one_pass(clip, tokens), (owner, method)
        setattr(owner, method, found) if there else delattr(owner, method)
    skipping = clip.clone()
    skipping.layer_idx = -2
    assert not host.runs_in_one_pass(skipping, tokens)
    assert host.runs_in_one_pass(clip, tokens)

    # a block's linear that somebody hooked is called
    linear, calls = text.transformer.model.layers[1].mlp.up_proj, []
    hook = linear.register_forward_hook(lambda module, given, out: calls.append(1) or out * 2)
    ours = host.encode_prompts(clip, tokens, {})
    once = len(calls)
    result["hooked"] = (difference(ours, [clip.encode_from_tokens_scheduled(t) for t in tokens]), once)
    hook.remove()

    # as ComfyUI leaves a failed prompt
    visual = text.transformer.visual
    merger, visual.merger = visual.merger, torch.nn.Linear(1, 1)
    try:
        host.encode_prompts(clip, tokenize(["grey", " "], [torch.rand(1, 64, 64, 3)]), {})
    except RuntimeError:
        result["failed"] = True
    visual.merger = merger
    assert not {"encode", "preprocess_embed"} & (vars(text).keys() | vars(text.transformer).keys())
print("RESULT", json.dumps(result))
"""
)


@pytest.fixture(scope="module")
def found(host):
    printed = run_in_comfyui(host, f"CASES = {CASES!r}\n{CODE}")
    return json.loads(printed.split("RESULT", 1)[1])


@pytest.mark.parametrize("case", CASES)
def test_one_pass_gives_what_each_prompt_gives_alone(found, case):
    assert found[case]["error"] < TOLERANCE


def test_one_pass_takes_fewer_operations(found):
    theirs, ours = found["three pictures"]["ops"]
    assert ours < theirs / 3


def test_bfloat16_where_the_loader_asked_for_it(found):
    assert 1e-4 < found["bfloat16"] < 0.03
    assert found["bfloat16 lora clone"] == found["bfloat16"]
    assert found["float32"] < TOLERANCE


def test_scaled_fp8_files(found):
    assert found["fp8"] < TOLERANCE
    assert 1e-4 < found["fp8, bfloat16"] < 0.03


def test_hooked_modules_are_called_once_for_all_prompts(found):
    error, calls = found["hooked"]
    assert error < TOLERANCE
    assert calls == 1


def test_nothing_stays_replaced_after_an_error(found):
    assert found["failed"]
