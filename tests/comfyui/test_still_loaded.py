"""Loading is skipped only for a DynamicVRAM model that is on the card, or has room there, as its patcher wants it.

DynamicVRAM needs a card, so a stand-in has its patcher's names here.
"""

import json

import pytest
from comfy_process import run_in_comfyui
from native_clip import SMALL_NATIVE_CLIP

pytestmark = [pytest.mark.server, pytest.mark.slow]

CODE = """
import json
from types import SimpleNamespace
import comfy.model_management as management
from comfy.model_patcher import ModelPatcherDynamic
from pack.nodes.host.memory import PreparedOnce, still_loaded

prioritized = []


def patcher(**different):
    pages = SimpleNamespace(prioritize=lambda: prioritized.append(1))
    model = SimpleNamespace(
        current_weight_patches_uuid=1, model_loaded_weight_memory=8, dynamic_vbars={"card": pages},
        dynamic_pins={"card": {"active": False}},
    )
    given = {
        "model": model, "load_device": "card", "patches": {}, "injections": {}, "forced_hooks": None, "patches_uuid": 1,
        "weight_wrapper_patches": {}, "object_patches": {}, "object_patches_backup": {},
        "is_dynamic": lambda: True, "get_all_callbacks": lambda kind: [], "current_loaded_device": lambda: "card", "loaded_size": lambda: 100, "model_size": lambda: 100,
    }
    return SimpleNamespace(**(given | different))


def answer(patcher, room=2**40, listed=True):
    management.current_loaded_models[:] = [SimpleNamespace(model=patcher)] if listed else []
    management.get_free_memory = lambda device: room
    try:
        return still_loaded(patcher)
    finally:
        management.current_loaded_models.clear()


found = {"whole": answer(patcher())}
assert prioritized == [1]
found["not listed"] = answer(patcher(), listed=False)
found["no room to work"] = answer(patcher(), room=2**20)
found["classic"] = answer(patcher(is_dynamic=lambda: False))
found["in part, with room for the rest"] = answer(patcher(loaded_size=lambda: 2**40 - 2**32, model_size=lambda: 2**40))
assert prioritized == [1, 1]
found["in part, and no room for the rest"] = answer(patcher(loaded_size=lambda: 1, model_size=lambda: 2**40))
found["with a LoRA"] = answer(patcher(patches={"weight": 1}))
found["after a clone with a LoRA"] = answer(patcher(patches_uuid=2))
found["with its object not yet in it"] = answer(patcher(object_patches={"layer": 1}))
found["with another object in it"] = answer(patcher(object_patches_backup={"layer": 0}))
with_object = {"object_patches": {"layer": 1}, "object_patches_backup": {"layer": 0}}
mine, replaced = patcher(**with_object), patcher(**with_object)
mine.model.layer, replaced.model.layer = 1, 2
found["with its object in it"] = answer(mine)
found["with its object replaced"] = answer(replaced)
found["with injections"] = answer(patcher(injections={"bypass_lora": []}))
found["with hooks"] = answer(patcher(forced_hooks=["hook"]))
found["with callbacks"] = answer(patcher(get_all_callbacks=lambda kind: [print]))
small = patcher()
small.model.model_loaded_weight_memory = 0
found["small weights taken off"] = answer(small)
assert prioritized == [1, 1, 1]


def prepares(device="card", **different):
    # whether a patcher that prepares once asks ComfyUI to prepare its model
    asked = []
    ModelPatcherDynamic.partially_load = lambda self, *given: asked.append(given)
    one = object.__new__(PreparedOnce)
    vars(one).update(vars(patcher(loaded_size=lambda: 50)), **different)
    management.get_free_memory = lambda device: 2**40
    one.partially_load(device)
    return bool(asked)


again = {"on the card in part": prepares()}
again["elsewhere"] = prepares(device="other card")
again["on another card now"] = prepares(current_loaded_device=lambda: "other card")
again["with a LoRA"] = prepares(patches={"weight": 1})
again["unloaded since"] = prepares(model=small.model)
print("RESULT", json.dumps({"skipped": found, "prepared": again}))
"""


def test_only_what_loading_would_not_change(host):
    found = json.loads(run_in_comfyui(host, CODE).split("RESULT", 1)[1])
    assert [name for name, skipped in found["skipped"].items() if skipped] == [
        "whole",
        "in part, with room for the rest",
        "with its object in it",
    ]
    assert [name for name, prepared in found["prepared"].items() if not prepared] == ["on the card in part"]


REAL = (
    SMALL_NATIVE_CLIP
    + """
from types import SimpleNamespace
import comfy.model_management
from pack.nodes.host.memory import objects_in_place
from server import PromptServer
PromptServer.instance = SimpleNamespace(prompt_queue=SimpleNamespace(currently_running=True))

with small_sizes(64):
    target = SimpleNamespace(params={}, clip=qwen_image.QwenImageTEModel, tokenizer=qwen_image.QwenImageTokenizer)
    clip = comfy.sd.CLIP(target)
    found = [bool(clip.patcher.object_patches)]
    comfy.model_management.load_models_gpu([clip.patcher])
    found.append(objects_in_place(clip.patcher))
    comfy.model_management.unload_all_models()
    found.append(objects_in_place(clip.patcher))
print("RESULT", found)
"""
)


def test_a_clip_of_comfyui_counts_as_prepared_once_it_is_loaded(host):
    """ComfyUI gives every CLIP's model an object, which for a while kept all of them from being taken for loaded."""
    assert run_in_comfyui(host, REAL).split("RESULT", 1)[1].strip() == "[True, True, False]"
