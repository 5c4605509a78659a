"""QwenEditEncode does equal work once, and gives what each prompt gives alone: our CLIP and ComfyUI's own."""

import json
from pathlib import Path

import pytest
from comfy_process import run_in_comfyui

pytestmark = pytest.mark.server

DEMO = Path(__file__).parents[2] / "demo_model"

CODE = """
import json
import comfy.sd
import comfy.hooks
from comfy.model_patcher import ModelPatcher
from comfy.text_encoders import llama, qwen_image, qwen_vl
from pack.nodes.host.clip import load_clip
from pack.nodes.host.encoding import Edit, Encoder, split_batches
from pack.nodes.host.vae import load_vae


def small_native_clip():
    # ComfyUI's classes with their sizes reduced, random weights
    config, vision = llama.Qwen25_7BVLI_Config, qwen_vl.Qwen2VLVisionTransformer
    llama.Qwen25_7BVLI_Config = lambda **_: config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    qwen_vl.Qwen2VLVisionTransformer = lambda hidden_size, **given: vision(
        hidden_size=64, num_heads=4, intermediate_size=64, num_layers=8, **given
    )
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = qwen_image.QwenImageTEModel(device="cpu", dtype=torch.float32)
    llama.Qwen25_7BVLI_Config, qwen_vl.Qwen2VLVisionTransformer = config, vision
    for name, parameter in clip.cond_stage_model.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * 0.1 + ("norm" in name or "ln_q" in name))
    clip.tokenizer = qwen_image.QwenImageTokenizer()
    device = torch.device("cpu")
    clip.patcher = ModelPatcher(clip.cond_stage_model, load_device=device, offload_device=device)
    clip.patcher.is_clip, clip.patcher.hook_mode = True, comfy.hooks.EnumHookMode.MinVram
    clip.layer_idx, clip.use_clip_schedule, clip.apply_hooks_to_conds, clip.tokenizer_options = None, False, None, {}
    return clip


class Counted:
    def __init__(self, owner, method):
        self.calls, call = 0, getattr(owner, method)

        def counted(*given, **named):
            self.calls += 1
            return call(*given, **named)

        setattr(owner, method, counted)


def edits():
    g = torch.Generator().manual_seed(1)
    first, second = split_batches("pictures", [torch.rand(2, 96, 64, 3, generator=g)])
    other = torch.rand(1, 96, 64, 3, generator=g)
    # two rows that share both pictures, then one that shares picture 2
    rows = [("grey", (first, second)), ("red", (first, second)), ("red", (other, second))]
    return [Edit(prompt, " ", pictures) for prompt, pictures in rows]


def run(clip, vae):
    encoder = Encoder(clip, vae)
    return [encoder.encode(edit)[:2] for edit in edits()]


def run_alone(clip, vae):
    # nothing shared: an encoder for each prompt, which stands at the place of both
    found = []
    for edit in edits():
        alone = [Encoder(clip, vae).encode(Edit(text, text, edit.pictures))[0] for text in (edit.prompt, " ")]
        found.append(alone)
    return found


def difference(one, other):
    worst = 0
    for row, other_row in zip(one, other, strict=True):
        for a, b in zip(row, other_row, strict=True):
            latents = zip(a[0][1]["reference_latents"], b[0][1]["reference_latents"], strict=True)
            for x, y in [(a[0][0], b[0][0]), *latents]:
                assert x.shape == y.shape
                worst = max(worst, ((x - y).norm() / y.norm()).item())
    return worst


with torch.inference_mode():
    vae, folder, native = load_vae(Path(FOLDER)), load_clip(Path(FOLDER)), small_native_clip()
    result = {}
    for name, clip in (("folder", folder), ("native", native)):
        expected = run_alone(clip, vae)
        model = clip.cond_stage_model
        tower = model.transformer.model.visual if name == "folder" else model.qwen25_7b.transformer.visual
        towers, texts, latents = Counted(tower, "forward"), Counted(model, "encode_token_weights"), Counted(vae, "encode")
        found = run(clip, vae)
        result[name] = {
            "difference": difference(found, expected),
            "vision": towers.calls,
            "text": texts.calls,
            "latents": latents.calls,
        }
    assert "preprocess_embed" not in vars(native.cond_stage_model.qwen25_7b.transformer)
print("RESULT", json.dumps(result))
"""


@pytest.fixture(scope="module")
def found(host):
    printed = run_in_comfyui(host, f"FOLDER = {str(DEMO)!r}\n{CODE}")
    return json.loads(printed.split("RESULT", 1)[1])


@pytest.mark.parametrize("clip", ["folder", "native"])
def test_sharing_changes_nothing(found, clip):
    assert found[clip]["difference"] == 0


def test_the_folders_vision_tower_runs_once_for_each_set_of_pictures(found):
    assert found["folder"]["vision"] == 2


def test_comfyuis_vision_tower_runs_once_for_each_picture_of_an_edit(found):
    # row 2 has one prompt to encode, of two pictures
    assert found["native"]["vision"] == 3 * 2


@pytest.mark.parametrize("clip", ["folder", "native"])
def test_prompts_and_references_are_encoded_once(found, clip):
    # the negative of row 2 is that of row 1; its pictures too, and picture 2 of row 3
    assert (found[clip]["text"], found[clip]["latents"]) == (2 + 1 + 2, 3)
