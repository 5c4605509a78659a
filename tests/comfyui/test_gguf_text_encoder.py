"""A text encoder in GGUF, with the vision part in a second file: ComfyUI's own encoder with the same weights is the oracle.

The files are written with the ``gguf`` package, under the names that its own tables give to transformers' ones.
"""

import json
from pathlib import Path

import pytest
from comfy_process import run_in_comfyui
from native_clip import SMALL_NATIVE_CLIP

pytestmark = [pytest.mark.server, pytest.mark.slow]

CODE = (
    SMALL_NATIVE_CLIP
    + """
import json
import re
from types import SimpleNamespace
sys.path += TESTS
import comfy.memory_management
import comfy.model_management
import folder_paths
import gguf
import gguf_files
from gguf.tensor_mapping import get_tensor_name_map
from server import PromptServer
PromptServer.instance = SimpleNamespace(prompt_queue=SimpleNamespace(currently_running=True))
from pack.nodes.host import folders, loading
from pack.nodes.host.prompts import encode_prompts, runs_in_one_pass
from pack.nodes.host.request import LoadRequest

HIDDEN = 256
FOLDER = Path(FOLDER)
WORDS = FOLDER / "Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf"
SEES = FOLDER / "Qwen2.5-VL-7B-Instruct-mmproj-Q8_0.gguf"
TABLES = [get_tensor_name_map(arch, 8) for arch in (gguf.MODEL_ARCH.QWEN2VL, gguf.MODEL_ARCH.MMPROJ)]


def name_in_file(name):
    module, _, parameter = name.rpartition(".")
    for table in TABLES:
        found = table.get_name(module)
        if found is not None:
            return f"{found}.{parameter}"
    raise AssertionError(name)


def as_in_the_files(state):
    words, sees = {}, {}
    for name, tensor in state.items():
        if name.endswith("patch_embed.proj.weight"):
            first = name_in_file(name)
            sees[first], sees[first + ".1"] = tensor[:, :, 0], tensor[:, :, 1]
        elif ".attn.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                sees[name_in_file(name.replace("attn.qkv", f"attn.{part}"))] = rows
        else:
            (sees if name.startswith("visual.") else words)[name_in_file(name)] = tensor
    words["output.weight"] = torch.zeros(8, HIDDEN)  # the language head, which nothing needs
    return words, sees


def kind(name, tensor):
    if tensor.ndim == 1 or "patch_embd" in name:
        return "F32"
    if name.startswith(("v.", "mm.")):
        return "F16" if "ffn" in name else "Q8_0"
    return {"token_embd.weight": "Q8_0", "blk.1.attn_k.weight": "F16", "output.weight": "F16"}.get(name, "Q4_K")


def write():
    '''Both files; what their weights are, by transformers' names.'''
    with small_sizes(HIDDEN):
        shapes = qwen_image.QwenImageTEModel(device="meta", dtype=torch.float32).qwen25_7b.transformer.state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in shapes.items():
        state[name] = torch.randn(tensor.shape, generator=generator) * 0.1 + ("norm" in name or "ln_q" in name)
    words, sees = as_in_the_files(state)
    floats = gguf_files.write(WORDS, words, kind, architecture="qwen2vl")
    floats |= gguf_files.write(SEES, sees, kind, architecture="clip")
    for name in sees:  # blocks that are put together become bfloat16
        if kind(name, sees[name]) == "Q8_0" and re.search("attn_[qkv]", name):
            floats[name] = floats[name].bfloat16().float()
    made = {}
    for name in state:
        if name.endswith("patch_embed.proj.weight"):
            first = name_in_file(name)
            made[name] = torch.stack([floats[first], floats[first + ".1"]], dim=2)
        elif ".attn.qkv." in name:
            made[name] = torch.cat([floats[name_in_file(name.replace("attn.qkv", f"attn.{p}"))] for p in "qkv"])
        else:
            made[name] = floats[name_in_file(name)]
    return made


def ours():
    with small_sizes(HIDDEN):
        return loading._single_clip(LoadRequest("demo", text_encoder=WORDS.name), WORDS)


def encoded():
    '''Alone and in one pass; the weights stay in blocks, are dropped and read again; a patcher changes one and restores it.'''
    state = write()
    native = small_native_clip(hidden=HIDDEN)
    native.cond_stage_model.qwen25_7b.transformer.load_state_dict(state)
    clip = ours()
    picture = torch.rand(1, 56, 84, 3, generator=torch.Generator().manual_seed(1))
    texts = [("a red <|im_start|>", [picture]), ("no picture at all", [])]
    expected, found = ([c.encode_from_tokens(c.tokenize(t, images=i)) for t, i in texts] for c in (native, clip))
    error = lambda a, b: float((a.float() - b.float()).norm() / b.float().norm())
    result = {"alone": [error(a, b) for a, b in zip(found, expected, strict=True)]}
    prompts = [clip.tokenize(text, images=[picture]) for text in ("a hat", "no hat")]
    assert runs_in_one_pass(clip, prompts)
    together = [conds[0][0] for conds in encode_prompts(clip, prompts, {})]
    alone = [native.encode_from_tokens(native.tokenize(t, images=[picture])) for t in ("a hat", "no hat")]
    result["together"] = [error(a, b) for a, b in zip(together, alone, strict=True)]
    encoder = clip.cond_stage_model.qwen25_7b.transformer
    result["dtypes"] = [
        str(m.weight.dtype) for m in (encoder.model.layers[0].mlp.down_proj, encoder.model.embed_tokens, encoder.model.norm)
    ]
    waiting = ours().cond_stage_model.qwen25_7b.transformer
    result["announced"] = all(
        waiting.get_parameter(name).dtype == parameter.dtype for name, parameter in encoder.named_parameters()
    )
    result["bytes"] = [clip.patcher.model_size(), WORDS.stat().st_size + SEES.stat().st_size]

    comfy.memory_management.aimdo_enabled = True  # as on a card with DynamicVRAM, which makes ComfyUI's layers without weights
    try:
        made_then = ours()
    finally:
        comfy.memory_management.aimdo_enabled = False
    result["made with DynamicVRAM"] = bool(torch.equal(made_then.encode_from_tokens(made_then.tokenize("no picture at all")), found[1]))

    changed = clip.clone()
    key = "qwen25_7b.transformer.model.layers.0.mlp.down_proj.weight"
    changed.patcher.add_patches({key: ("diff", (torch.full((HIDDEN, HIDDEN), 0.5),))})
    state["model.layers.0.mlp.down_proj.weight"] += 0.5
    native.cond_stage_model.qwen25_7b.transformer.load_state_dict(state)
    tokens = clip.tokenize("no picture at all")
    result["patched"] = error(changed.encode_from_tokens(tokens), native.encode_from_tokens(native.tokenize("no picture at all")))
    result["restored"] = bool(torch.equal(clip.encode_from_tokens(tokens), found[1]))

    PromptServer.instance.prompt_queue.currently_running = False
    comfy.model_management.unload_all_models()
    result["dropped"] = clip.cond_stage_model.is_empty
    PromptServer.instance.prompt_queue.currently_running = True
    result["again"] = bool(torch.equal(clip.encode_from_tokens(tokens), found[1]))

    PromptServer.instance.prompt_queue.currently_running = False
    comfy.model_management.unload_all_models()
    PromptServer.instance.prompt_queue.currently_running = True
    whole = WORDS.rename(FOLDER / "whole")
    WORDS.write_bytes(whole.read_bytes()[:-65_536])
    try:
        clip.encode_from_tokens(tokens)
        result["cut off"] = False
    except (OSError, RuntimeError):
        result["cut off"] = clip.cond_stage_model.is_empty
    whole.replace(WORDS)
    result["whole again"] = bool(torch.equal(clip.encode_from_tokens(tokens), found[1]))

    try:
        clip.state_dict_for_saving()
    except ValueError as e:
        result["saving"] = str(e)
    result["names"] = clip.get_sd().keys() == native.get_sd().keys()

    folder_paths.add_model_folder_path("text_encoders", str(FOLDER))
    before = folders.fingerprint_of(folders.text_encoder_path, [WORDS.name]), loading.fingerprint(loading._files(WORDS, "text_encoder"))
    SEES.touch()
    after = folders.fingerprint_of(folders.text_encoder_path, [WORDS.name]), loading.fingerprint(loading._files(WORDS, "text_encoder"))
    result["another vision file"] = [a != b for a, b in zip(after, before, strict=True)]
    result["offered"] = [name for name in folders.text_encoders() if name.endswith(".gguf")]
    assert folders.text_encoder_path(WORDS.name) == WORDS
    return result


def refused():
    try:
        ours()
    except ValueError as e:
        return str(e)


def faults():
    write()
    hidden = SEES.rename(FOLDER / "away")
    messages = {"nothing": refused()}
    gguf_files.write(FOLDER / "mmproj-F16.gguf", {"mm.2.weight": torch.zeros(8, 8)}, lambda *_: "F16", architecture="clip")
    messages["another"] = refused()
    hidden.rename(SEES)
    assert refused() is None  # and the right one is taken
    SEES.write_bytes(SEES.read_bytes()[:-64])
    messages["cut off"] = refused()
    gguf_files.write(WORDS, {"blk.0.attn_q.weight": torch.zeros(64, 64)}, lambda *_: "F16", architecture="llama")
    messages["llama"] = refused()
    gguf_files.write(WORDS, {"token_embd.weight": torch.tensor(1.0)}, lambda *_: "F32", architecture="qwen2vl")
    messages["no dimensions"] = refused()
    return messages


with torch.inference_mode():
    print("RESULT", json.dumps([encoded(), faults()]))
"""
)


@pytest.fixture(scope="module")
def results(host, tmp_path_factory) -> tuple[dict, dict[str, str]]:
    """Of ``encoded`` and ``faults``, in one process."""
    tests = Path(__file__).parents[1]
    before = f"TESTS = {[str(tests), str(tests.parent)]!r}\nFOLDER = {str(tmp_path_factory.mktemp('gguf'))!r}\n"
    return json.loads(run_in_comfyui(host, before + CODE, timeout_s=300).split("RESULT ", 1)[1])


def test_encodes_as_comfyui_with_the_same_weights(results):
    result, _ = results
    assert max(result["alone"] + result["together"]) < 1e-4
    assert result["dtypes"] == ["torch.uint8", "torch.uint8", "torch.float32"]
    assert result["made with DynamicVRAM"]
    assert result["announced"]  # by which the encoder's own dtype is chosen before anything is read
    ours, files = result["bytes"]
    assert 0.9 * files < ours <= files
    assert result["patched"] < 0.01  # a patched weight becomes bfloat16
    assert (result["restored"], result["dropped"], result["again"]) == (True, True, True)
    assert (result["cut off"], result["whole again"]) == (True, True)
    assert result["another vision file"] == [True, True]  # to the node, and to what it keeps
    assert result["saving"].startswith("[QE_INPUT] A text encoder in GGUF can't be saved.")
    assert result["names"]
    assert result["offered"] == ["Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf"]


def test_what_is_refused(results):
    """Each with what to do; a file that sees pictures for another model counts as none."""
    _, messages = results
    assert all(message.startswith("[QE_WEIGHTS] ") for message in messages.values())
    assert "is not beside it. Download that of Qwen2.5-VL 7B" in messages["nothing"]
    assert "mmproj-F16.gguf is of another model" in messages["another"]
    assert "download was cut off" in messages["cut off"]
    assert "token_embd.weight has no dimensions" in messages["no dimensions"]
    assert "found the architecture 'llama', this needs the text encoder" in messages["llama"]
