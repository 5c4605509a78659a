"""QwenEditAccelerate on the real server: a small random-weight file of the native kind, with and without the node.

The server computes in fp32, so our forward and ComfyUI's differ by the order of additions only.
"""

import itertools
import time
from pathlib import Path

import pytest
import torch
from array_client import ArrayClient
from comfy_client import ExecutionFailed, Interrupted
from comfy_server import ComfyServer
from edits import failure, look, note, small_edit
from graphs import Graph, node
from safetensors.torch import load_file, save_file

from qwen_edit.transformer import QwenEditTransformer

pytestmark = pytest.mark.server

TOLERANCE = 1e-5
MOVED = 1e-4  # what really changes something
FILE, FP8_FILE, LORA = "accelerate.safetensors", "accelerate fp8.safetensors", "accelerate lora.safetensors"
PLAIN, FAST = ["unet", 0], ["accelerate", 0]
TEXT_WIDTH = 64
LORA_TARGETS = [
    f"transformer_blocks.{block}.{linear}"
    for block in (0, 2)
    for linear in ("attn.to_q", "attn.to_out.0", "img_mlp.net.2", "img_mod.1", "txt_mod.1")
]
LORA_RANK = 4
SWITCHED = {f"lora_{slot}": "none" for slot in range(2, 5)} | {f"strength_{slot}": 1.0 for slot in range(1, 5)}
SWITCHED["lora_1"] = LORA
_nonce = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def weights(models: Path) -> Path:
    """A small transformer as one file, which a probe makes ComfyUI's own loader take, and a LoRA for it."""
    torch.manual_seed(0)
    shape = dict(num_layers=3, attention_head_dim=128, num_attention_heads=2, joint_attention_dim=TEXT_WIDTH)
    model = QwenEditTransformer(**shape)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    path = models / "diffusion_models" / FILE
    save_file(state | {"__index_timestep_zero__": torch.zeros(0)}, path)
    lora = {}
    for target in LORA_TARGETS:
        linear = model.get_submodule(target)
        for part, size in (("down", (LORA_RANK, linear.in_features)), ("up", (linear.out_features, LORA_RANK))):
            lora[f"diffusion_model.{target}.lora_{part}.weight"] = torch.randn(size) * 0.1
    save_file(lora, models / "loras" / LORA)
    return path


class Samplings:
    """One graph with several KSamplers."""

    def __init__(self, file: str = FILE, height: int = 6, width: int = 8):
        self.graph: Graph = {
            "unet": node("UNETLoader", unet_name=file, weight_dtype="default"),
            "accelerate": node("QwenEditAccelerate", model=PLAIN, attention="auto"),
            "reference": node("ProbeLatent", height=6, width=8, seed=1),
            "positive": node("ProbeConditioning", tokens=9, width=TEXT_WIDTH, seed=2),
            "negative": node("ProbeConditioning", tokens=9, width=TEXT_WIDTH, seed=3),
        }
        self.size = height, width
        for which in ("positive", "negative"):
            self.add(f"{which} edit", "ReferenceLatent", conditioning=[which, 0], latent=["reference", 0])

    def add(self, name: str, class_type: str, **inputs) -> list:
        self.graph[name] = node(class_type, **inputs)
        return [name, 0]

    def sample(self, name: str, model: list, *, positive=None, negative=None, size=None, cfg=1.0, steps=2, seed=7):
        """A KSampler called `name` that runs anew in each prompt."""
        height, width = size or self.size
        latent = self.add(f"{name} latent", "ProbeLatent", height=height, width=width, seed=0)
        again = self.add(f"{name} again", "ProbePass", value=latent, nonce=str(next(_nonce)))
        self.graph[name] = node(
            "KSampler",
            model=model,
            positive=positive or ["positive edit", 0],
            negative=negative or ["negative edit", 0],
            latent_image=again,
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )
        self.add(f"{name} save", "SaveLatent", samples=[name, 0], filename_prefix="latents/accelerate")

    def edit(self, which: str, class_type: str, **inputs) -> list:
        """Another node over the positive conditioning with its reference."""
        return self.add(f"positive {which}", class_type, conditioning=["positive edit", 0], **inputs)

    def run(self, client: ArrayClient, server: ComfyServer) -> dict[str, torch.Tensor]:
        """The results by the samplers' names."""
        result = client.run(self.graph, timeout_s=240)
        found = {}
        for name, output in result.outputs.items():
            for saved in output.get("latents", []):
                path = server.output / saved["subfolder"] / saved["filename"]
                found[name.removesuffix(" save")] = load_file(path)["latent_tensor"]
        return found


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


def rms(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def texts(client: ArrayClient) -> list[tuple[str, str]]:
    """What nodes have said while they ran: (node, text)."""
    return [(e.data["node"], e.data["text"]) for e in client.events if e.type == "progress_text"]


# Sameness

METHODS = ("index", "index_timestep_zero")
CASES = ("one reference", *METHODS, "odd size", "two references", "no reference", "guidance")


@pytest.fixture(scope="module")
def compared(server):
    """Each case with and without the node."""
    made = Samplings()
    for method in METHODS:
        made.edit(method, "FluxKontextMultiReferenceLatentMethod", reference_latents_method=method)
    made.add("second", "ProbeLatent", height=10, width=5, seed=5)
    made.edit("two", "ReferenceLatent", latent=["second", 0])
    for which, model in (("native", PLAIN), ("fast", FAST)):
        made.sample(f"{which} one reference", model)
        for method in METHODS:
            made.sample(f"{which} {method}", model, positive=[f"positive {method}", 0])
        made.sample(f"{which} odd size", model, size=(7, 9))
        made.sample(f"{which} two references", model, positive=["positive two", 0])
        made.sample(f"{which} no reference", model, positive=["positive", 0])
        made.sample(f"{which} guidance", model, cfg=3.0)
    with ArrayClient(server.url) as client:
        return made.run(client, server), texts(client)


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_comfyuis_own(compared, case):
    results, _ = compared
    fast, native = results[f"fast {case}"], results[f"native {case}"]
    assert fast.shape == native.shape
    assert difference(fast, native) < TOLERANCE
    assert not torch.equal(fast, native), "equal to the last bit: our forward has not run"


def test_the_cases_differ_and_nothing_fell_back(compared):
    results, said = compared
    for one, other in itertools.combinations([c for c in CASES if c != "odd size"], 2):
        if {one, other} != {"one reference", "index_timestep_zero"}:  # what the file says and what the node says
            assert difference(results[f"fast {one}"], results[f"fast {other}"]) > MOVED, (one, other)
    assert said == []


# With what people put beside it


@pytest.fixture(scope="module")
def beside(server):
    """LoRAs, the template's nodes and EasyCache, with and without ours and in both orders; all in one prompt."""
    made = Samplings()
    lora = dict(lora_name=LORA, strength_model=1.0)
    made.sample("native", PLAIN)
    made.sample("fast", FAST)
    made.sample("native lora", made.add("native lora loader", "LoraLoaderModelOnly", model=PLAIN, **lora))
    made.sample(
        "fast after lora",
        made.add("over lora", "QwenEditAccelerate", model=["native lora loader", 0], attention="auto"),
    )
    made.sample("fast before lora", made.add("lora over", "LoraLoaderModelOnly", model=FAST, **lora))
    made.sample("fast switched", made.add("switch", "QwenEditLoraSwitch", model=FAST, **SWITCHED))
    made.sample("fast fused", made.add("fused", "QwenEditLoraSwitch", model=FAST, mode="fused", **SWITCHED))
    made.sample("native again", PLAIN)
    made.sample("fast again", FAST)
    made.sample("fast twice", made.add("twice", "QwenEditAccelerate", model=FAST, attention="pytorch"))
    for which, model in (("native", PLAIN), ("fast", FAST)):
        shifted = made.add(f"{which} shift", "ModelSamplingAuraFlow", model=model, shift=3.1)
        normed = made.add(f"{which} norm", "CFGNorm", model=shifted, strength=1.0)
        made.sample(f"{which} template", normed, cfg=4.0)
    for threshold in (0.0, 3.0):
        cache = dict(reuse_threshold=threshold, start_percent=0.0, end_percent=1.0, verbose=False)
        easy = made.add(f"easy {threshold}", "EasyCache", model=PLAIN, **cache)
        made.sample(f"native easy {threshold}", easy, steps=6)
        made.sample(
            f"fast after easy {threshold}",
            made.add(f"over {threshold}", "QwenEditAccelerate", model=easy, attention="auto"),
            steps=6,
        )
        over = made.add(f"easy over {threshold}", "EasyCache", model=FAST, **cache)
        made.sample(f"fast before easy {threshold}", over, steps=6)
    with ArrayClient(server.url) as client:
        results = made.run(client, server)
        assert texts(client) == []
        return results


@pytest.mark.parametrize(
    ("fast", "native"),
    [
        ("fast", "native"),
        ("fast after lora", "native lora"),
        ("fast before lora", "native lora"),
        ("fast template", "native template"),
        ("fast after easy 0.0", "native easy 0.0"),
        ("fast before easy 0.0", "native easy 0.0"),
        ("fast after easy 3.0", "native easy 3.0"),
        ("fast before easy 3.0", "native easy 3.0"),
    ],
)
def test_other_nodes_work_before_and_after_it(beside, fast, native):
    assert difference(beside[fast], beside[native]) < TOLERANCE
    assert not torch.equal(beside[fast], beside[native])


def test_a_lora_and_easycache_really_did_something(beside):
    assert difference(beside["native lora"], beside["native"]) > MOVED
    assert difference(beside["native easy 3.0"], beside["native easy 0.0"]) > MOVED
    assert difference(beside["native template"], beside["native"]) > MOVED


def test_a_resident_lora_is_the_native_one(beside):
    """But for the rounding of the weights that ComfyUI patches."""
    moved = rms(beside["native"], beside["native lora"])
    assert rms(beside["fast switched"], beside["native lora"]) < 0.03 * moved


def test_a_fused_lora_is_patched_by_comfyui(beside):
    assert difference(beside["fast fused"], beside["fast before lora"]) < TOLERANCE


def test_a_resident_lora_needs_our_forward(client):
    def switched(model: list, patched: bool = False) -> Graph:
        made = Samplings()
        last = made.add("switch", "QwenEditLoraSwitch", model=model, **SWITCHED)
        made.sample("one", made.add("patch", "ProbePatch", model=last, kind="block") if patched else last)
        return made.graph

    with pytest.raises(ExecutionFailed, match="Put Qwen Edit Accelerate before this node"):
        client.run(switched(PLAIN))
    with pytest.raises(ExecutionFailed, match="double_block patches, and it does not apply the LoRAs"):
        client.run(switched(FAST, patched=True))
    client.run(switched(FAST))


def test_branches_do_not_disturb_each_other(beside):
    for which in ("native", "fast"):
        assert torch.equal(beside[f"{which} again"], beside[which])
    assert torch.equal(beside["fast twice"], beside["fast"])


def test_what_it_keeps_outlives_a_sampling_and_leaves_with_the_weights(client):
    def sampled(seed: int) -> list[int]:
        made = Samplings()
        made.sample("one", FAST, seed=seed)
        client.run(made.graph)
        return look(client)["modulation tables"]

    first = sampled(21)
    assert first
    assert sampled(22) == first  # though ComfyUI detaches the MODEL and loads it again in between
    client.post("/free", {"unload_models": True})
    until = time.monotonic() + 20
    while look(client)["modulation tables"]:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_lora_that_hooks_change_from_step_to_step(client, server):
    """Weights change in the middle of a sampling, the modulation's among them."""
    made = Samplings()
    made.add("hook", "CreateHookLoraModelOnly", lora_name=LORA, strength_model=1.0)
    made.add("first", "CreateHookKeyframe", strength_mult=0.2, start_percent=0.0)
    made.add("both", "CreateHookKeyframe", strength_mult=1.0, start_percent=0.5, prev_hook_kf=["first", 0])
    made.add("timed", "SetHookKeyframes", hooks=["hook", 0], hook_kf=["both", 0])
    made.add(
        "hooked", "ConditioningSetProperties", cond_NEW=["positive edit", 0], strength=1.0, set_cond_area="default"
    )
    made.graph["hooked"]["inputs"]["hooks"] = ["timed", 0]
    for which, model in (("native", PLAIN), ("fast", FAST)):
        made.sample(f"{which} plain", model, steps=4)
        made.sample(which, model, positive=["hooked", 0], cfg=2.0, steps=4)
        made.sample(f"{which} plain again", model, steps=4)
    results = made.run(client, server)
    assert difference(results["fast"], results["native"]) < TOLERANCE
    assert difference(results["native"], results["native plain"]) > MOVED
    assert torch.equal(results["fast plain again"], results["fast plain"])


def test_cancel_in_the_middle_leaves_everything_as_before(client, server):
    before = Samplings()
    before.sample("fast", FAST)
    good = before.run(client, server)["fast"]
    long = Samplings()
    long.sample("fast", FAST, steps=200)
    prompt_id = client.queue(long.graph)
    seen = []

    def on_event(event):
        if event.type == "progress" and event.data["max"] == 200:
            seen.append(event.data["value"])
            if len(seen) == 2:
                client.interrupt(prompt_id)

    with pytest.raises(Interrupted):
        client.wait(prompt_id, on_event, timeout_s=120)
    assert seen[-1] < 100
    after = Samplings()
    after.sample("fast", FAST)
    assert torch.equal(after.run(client, server)["fast"], good)


# What the forward does not honour

FALLBACKS = {
    "block": "double_block patches",
    "replace": "replaced blocks or attention",
    "attention": "an attention override",
    "control": "a ControlNet",
    "offset": "the reference method 'offset'",
    "frames": "reference latents of [1, 16, 3, 6, 8]",
}


@pytest.fixture(scope="module")
def fallbacks(server):
    made = Samplings()
    made.edit("control", "ProbeControl")
    made.edit("offset", "FluxKontextMultiReferenceLatentMethod", reference_latents_method="offset")
    made.add("clip", "ProbeLatent", height=6, width=8, seed=5, frames=3)
    made.add("positive frames", "ReferenceLatent", conditioning=["positive", 0], latent=["clip", 0])
    for which, model in (("native", PLAIN), ("fast", FAST)):
        for kind in ("block", "replace", "attention"):
            made.sample(f"{which} {kind}", made.add(f"{which} {kind} patch", "ProbePatch", model=model, kind=kind))
        for kind in ("control", "offset", "frames"):
            made.sample(f"{which} {kind}", model, positive=[f"positive {kind}", 0])
    with ArrayClient(server.url) as client:
        return made.run(client, server), texts(client)


@pytest.mark.parametrize("kind", FALLBACKS)
def test_what_is_not_honoured_runs_natively_and_says_so(fallbacks, server, kind):
    results, said = fallbacks
    assert torch.equal(results[f"fast {kind}"], results[f"native {kind}"])
    (line,) = [text for node_id, text in said if node_id == f"fast {kind}"]
    assert line.startswith(f"Runs ComfyUI's own forward, because of {FALLBACKS[kind]}")
    assert line in server.log.read_text(errors="replace")
    assert not [text for node_id, text in said if node_id == f"native {kind}"]


def test_a_model_of_the_loader_passes_through_with_a_note(client):
    graph = small_edit(client)
    graph["accelerate"] = node("QwenEditAccelerate", model=["loader", 0], attention="auto")
    plain = client.pictures(graph)
    graph["sampler"]["inputs"]["model"] = ["accelerate", 0]
    result = client.run(graph)
    assert "comes from QwenEditLoader" in note(result, "accelerate")
    assert (client.arrays(result)[0] == plain[0]).all()


def test_a_model_of_another_family_is_refused(client):
    graph = small_edit(client)
    graph["foreign"] = node("ProbePatch", model=["loader", 0], kind="foreign")
    graph["accelerate"] = node("QwenEditAccelerate", model=["foreign", 0], attention="auto")
    graph["sampler"]["inputs"]["model"] = ["accelerate", 0]
    said = failure(client, graph)
    assert said.startswith("[QE_INPUT] This MODEL holds Linear")


def test_an_attention_that_is_not_offered_is_refused(client):
    graph = small_edit(client)
    graph["text"] = node("ProbeText", text="nonsense")
    graph["accelerate"] = node("QwenEditAccelerate", model=["loader", 0], attention=["text", 0])
    graph["sampler"]["inputs"]["model"] = ["accelerate", 0]
    assert "[QE_INPUT] attention is 'nonsense'" in failure(client, graph)


# Out of memory


def test_out_of_memory_is_tried_once_more_and_said(client, server):
    made = Samplings()
    made.sample("good", FAST)
    made.sample("retried", made.add("once", "ProbeOutOfMemory", model=FAST, times=1, nonce=str(next(_nonce))))
    results = made.run(client, server)
    assert difference(results["retried"], results["good"]) < TOLERANCE
    ((where, line),) = texts(client)
    assert where == "retried"
    assert line.startswith("Out of memory: trying once more")


def test_out_of_memory_twice_is_comfyuis_error_and_the_next_one_works(client, server):
    made = Samplings()
    made.sample("good", FAST)
    good = made.run(client, server)["good"]
    failing = Samplings()
    failing.sample("fails", failing.add("twice", "ProbeOutOfMemory", model=FAST, times=2, nonce=str(next(_nonce))))
    with pytest.raises(ExecutionFailed, match="OutOfMemoryError"):
        failing.run(client, server)
    after = Samplings()
    after.sample("good", FAST)
    assert torch.equal(after.run(client, server)["good"], good)


# fp8 files


@pytest.fixture(scope="module")
def fp8_file(weights) -> Path:
    """The same weights as ComfyUI's fp8 files hold them: one scale for each linear of the blocks."""
    state = load_file(weights)
    layers = [
        name.removesuffix(".weight")
        for name, t in state.items()
        if name.startswith("transformer_blocks.") and t.ndim == 2
    ]
    for layer in layers:
        weight = state[f"{layer}.weight"].float()
        scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        state[f"{layer}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        state[f"{layer}.weight_scale"] = scale
        state[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    path = weights.with_name(FP8_FILE)
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def fp8(server, fp8_file):
    """A card's fp8 products are a separate prompt: the probe changes the loaded layers for good."""
    made, multiplied = Samplings(FP8_FILE), Samplings(FP8_FILE)
    made.add("bf16", "UNETLoader", unet_name=FILE, weight_dtype="default")
    made.sample("exact", ["bf16", 0])
    products = multiplied.add("products", "ProbeFP8Products", model=PLAIN)
    multiplied.graph["accelerate"]["inputs"]["model"] = products
    for which, model in (("native", PLAIN), ("fast", FAST)):
        made.sample(which, model)
        lora = made.add(f"{which} with lora", "LoraLoaderModelOnly", model=model, lora_name=LORA, strength_model=1.0)
        made.sample(f"{which} lora", lora)
        made.sample(f"{which} again", model)
        multiplied.sample(f"{which} products", products if which == "native" else FAST)
    with ArrayClient(server.url) as client:
        results = made.run(client, server) | multiplied.run(client, server)
        assert texts(client) == []
        return results


def test_fp8_weights_without_fp8_products_equal_the_native_result(fp8):
    assert rms(fp8["native"], fp8["exact"]) > MOVED  # really other weights
    for which in ("", " lora"):
        assert difference(fp8[f"fast{which}"], fp8[f"native{which}"]) < TOLERANCE
    assert rms(fp8["fast lora"], fp8["fast"]) > 10 * MOVED


def test_a_native_lora_leaves_fp8_weights_as_they_were(fp8):
    assert torch.equal(fp8["native again"], fp8["native"])
    assert torch.equal(fp8["fast again"], fp8["fast"])


def test_fp8_products_are_finer_than_the_native_ones(fp8):
    """Ours scale each token's activations, ComfyUI's take them as they are."""
    ours, native = fp8["fast products"], fp8["native products"]
    assert MOVED < rms(ours, fp8["native"]) < rms(native, fp8["native"]) < 1e-2
    assert rms(ours, fp8["exact"]) < rms(native, fp8["exact"])
