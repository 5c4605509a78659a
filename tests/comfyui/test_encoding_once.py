"""QwenEditEncode does equal work once, and gives what each prompt gives alone: our CLIP and ComfyUI's own."""

import json
from pathlib import Path

import pytest
from comfy_process import run_in_comfyui
from native_clip import SMALL_NATIVE_CLIP

pytestmark = [pytest.mark.server, pytest.mark.slow]

DEMO = Path(__file__).parents[2] / "demo_model"

CODE = (
    SMALL_NATIVE_CLIP
    + """
import json
from pack.nodes.host.clip import load_clip
from pack.nodes.host.encoding import Edit, Encoder, split_batches
from pack.nodes.host.vae import load_vae


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
    replaced = small_native_clip()
    for name, clip in (("folder", folder), ("native", native), ("replaced", replaced)):
        run_alone(clip, vae)  # loads it
        model = clip.cond_stage_model
        tower = model.transformer.model.visual if name == "folder" else model.qwen25_7b.transformer.visual
        # a tower with a forward of another pack runs as ComfyUI would run it, picture by picture
        towers = Counted(tower if name != "native" else tower.patch_embed, "forward")
        expected = run_alone(clip, vae)
        texts, latents = Counted(model, "encode_token_weights"), Counted(vae, "encode")
        towers.calls = 0
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
)


@pytest.fixture(scope="module")
def found(host):
    printed = run_in_comfyui(host, f"FOLDER = {str(DEMO)!r}\n{CODE}")
    return json.loads(printed.split("RESULT", 1)[1])


@pytest.mark.parametrize("clip", ["folder", "replaced"])
def test_sharing_changes_nothing(found, clip):
    assert found[clip]["difference"] == 0


def test_a_pass_of_two_prompts_rounds_differently_only(found):
    assert found["native"]["difference"] < 1e-6


def test_the_folders_vision_tower_runs_once_for_each_set_of_pictures(found):
    assert found["folder"]["vision"] == 2


def test_comfyuis_vision_tower_runs_once_for_the_pictures_that_are_new(found):
    # row 1 has two pictures; row 3 has one that was not in row 2
    assert (found["native"]["vision"], found["replaced"]["vision"]) == (2, 3)


@pytest.mark.parametrize("clip", ["folder", "native", "replaced"])
def test_prompts_and_references_are_encoded_once(found, clip):
    # the negative of row 2 is that of row 1; its pictures too, and picture 2 of row 3
    assert (found[clip]["text"], found[clip]["latents"]) == (2 + 1 + 2, 3)
