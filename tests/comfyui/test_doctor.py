"""The doctor on the real server: what nodes show, what is logged, and what `GET /qwen_edit/doctor` answers."""

import json
import re
import shutil
import urllib.error
import urllib.request

import pytest
import torch
from array_client import ArrayClient
from comfy_client import ExecutionFailed
from comfy_host import PACK_NAME, REPO
from comfy_process import save_comfyui_vae
from edits import changed, note, run_fresh, small_edit
from graphs import loader, node
from safetensors.torch import save_file
from test_accelerate import FAST, TEXT_WIDTH, Samplings
from test_faults import transformer_state
from test_lora import lora_state, with_switch
from test_sameness import DEMO

from qwen_edit.transformer import QwenEditTransformer

pytestmark = pytest.mark.server
LIGHTNING = "Qwen-Image-Edit-2511-Lightning-4steps-V1.0-demo.safetensors"
FUSED = "qwen_image_edit_2511_lightning_8steps"


@pytest.fixture(scope="module", autouse=True)
def files(models):
    lightning = sorted((DEMO / "loras").glob("*.safetensors"))[0]
    shutil.copy(lightning, models / "loras" / LIGHTNING)
    other = {f"transformer.other_blocks.{i}.to_q.lora_{part}.weight": 0 for i in range(30) for part in "AB"}
    state = lora_state(1)
    some = next(iter(state.values()))
    save_file(state | {name: some.clone() for name in other}, models / "loras" / "of_another.safetensors")
    shutil.copytree(DEMO, models / "diffusers" / FUSED)


@pytest.fixture
def graph(client):
    return small_edit(client, steps=4)


def doctor(client, result=None) -> dict:
    return client.get("/qwen_edit/doctor" + (f"?prompt_id={result.prompt_id}" if result else ""))


def found(client, result=None) -> list[tuple[str, str]]:
    return [(finding["code"], finding["node_id"]) for finding in doctor(client, result)["findings"]]


def status(server, query: str) -> tuple[int, dict]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(f"{server.url}/qwen_edit/doctor?{query}", timeout=60)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
    raise AssertionError(f"{query} should have been refused.")


def test_lightning_with_guidance_warns_until_the_preset_is_right(client, server, graph):
    wrong = run_fresh(client, with_switch(graph, lora_1=LIGHTNING))
    assert f"Warning: {LIGHTNING} is distilled for true CFG 1 and true_cfg_scale is 4" in note(wrong, "sampler")
    assert found(client) == found(client, wrong) == [("lightning-cfg", "sampler")]
    assert doctor(client)["findings"][0]["severity"] == "warning"
    assert server.log.read_text(errors="replace").count(f"Qwen Edit Fast: Warning: {LIGHTNING} is distilled") == 1

    fixed = changed(graph, "sampler", preset="Lightning 4", steps=0)
    right = run_fresh(client, with_switch(fixed, lora_1=LIGHTNING))
    assert note(right, "sampler") == "4 steps, guidance off, dynamic shift"
    assert found(client) == found(client, right) == []
    assert found(client, wrong) == [("lightning-cfg", "sampler")]


def test_a_lightning_preset_needs_lightning_from_any_loader(client, graph):
    fast = changed(graph, "sampler", preset="Lightning 4", steps=0)
    without = run_fresh(client, fast)
    assert found(client, without) == [("lightning-missing", "sampler")]
    assert "switch the 4-step Lightning LoRA on" in note(without, "sampler")

    lora = node("LoraLoaderModelOnly", model=["loader", 0], lora_name=LIGHTNING, strength_model=1.0)
    native = changed(fast, "sampler", model=["native", 0]) | {"native": lora}
    assert found(client, run_fresh(client, native)) == []
    guided = changed(native, "sampler", preset="custom", steps=4)
    assert found(client, run_fresh(client, guided)) == [("lightning-cfg", "sampler")]


def test_lightning_in_the_checkpoint_and_as_a_lora(client, graph):
    fused = changed(graph, "loader", model=f"folder: {FUSED}")
    fused = changed(fused, "sampler", preset="Lightning 8", steps=0)
    both = run_fresh(client, with_switch(fused, lora_1=LIGHTNING))
    assert found(client, both) == [("lightning-twice", "sampler")]
    assert "switch the Lightning LoRA off" in note(both, "sampler")
    assert found(client, run_fresh(client, with_switch(fused, lora_1=LIGHTNING, strength_1=0.0))) == []


def test_a_lora_of_another_model_and_too_much_strength(client, graph):
    switched = with_switch(graph, lora_1="of_another.safetensors", lora_2="of_another.safetensors", strength_2=1.5)
    result = run_fresh(client, switched)
    assert found(client, result) == [("lora-other-model", "sampler"), ("lora-strengths", "sampler")]
    assert re.search(r"of_another.safetensors fits this model in \d+ of its \d+ modules only", note(result, "sampler"))
    assert "Note: the strengths of 2 LoRAs add up to 2.5" in note(result, "sampler")


def test_the_loader_tells_a_guessed_version_and_the_sampler_keeps_it_when_the_loader_is_cached(
    client, host, graph, models
):
    save_comfyui_vae(host, DEMO, models / "vae" / "doctor.safetensors")
    save_file(transformer_state(), models / "diffusion_models" / "renamed.safetensors")
    single = loader(model="renamed.safetensors", text_encoder="none", vae="doctor.safetensors")
    guessed = changed(graph, "sampler", model=["transformer", 0]) | {"transformer": single}
    result = run_fresh(client, guessed)
    assert "so renamed runs as 2509; if that is wrong, choose the other as model_version" in note(result, "transformer")
    assert found(client, result) == [("version-guessed", "transformer")]
    again = client.run(changed(guessed, "sampler", seed=99), timeout_s=120)
    assert found(client, again) == [("version-guessed", "sampler")]
    assert "Warning" not in note(again, "sampler")
    told = run_fresh(client, changed(guessed, "transformer", model_version="2511"))
    assert found(client, told) == []


def test_a_vae_that_replaces_the_folders_own_and_one_of_another_family(client, host, graph, models):
    save_comfyui_vae(host, DEMO, models / "vae" / "doctor.safetensors")
    result = run_fresh(client, changed(graph, "loader", vae="doctor.safetensors"))
    assert found(client, result) == [("vae-statistics", "loader")]
    assert "doctor.safetensors replaces it" in note(result, "loader")

    pixels = changed(graph, "encode", vae=["pixels", 0]) | {"pixels": node("VAELoader", vae_name="pixel_space")}
    with pytest.raises(ExecutionFailed):
        run_fresh(client, pixels)
    assert found(client) == [("vae-family", "encode")]
    assert "connect qwen_image_vae" in doctor(client)["findings"][0]["sentence"]
    assert found(client, run_fresh(client, graph)) == []


@pytest.mark.parametrize("marked", [False, True])
def test_accelerate_tells_of_a_2511_file_that_comfyui_runs_as_2509(client, server, models, marked):
    torch.manual_seed(0)
    model = QwenEditTransformer(
        num_layers=1, attention_head_dim=128, num_attention_heads=2, joint_attention_dim=TEXT_WIDTH
    )
    mark = {"__index_timestep_zero__": torch.zeros(0)} if marked else {}
    name = f"qwen 2511 marked {marked}.safetensors"
    save_file(model.state_dict() | mark, models / "diffusion_models" / name)
    made = Samplings(name)
    made.sample("one", FAST)
    made.run(client, server)
    assert found(client) == ([] if marked else [("mark-ignored", "accelerate")])
    (facts,) = [m for m in doctor(client)["environment"]["models"] if m["model"] == name]
    assert facts["version"] == ("2511" if marked else "2509")


def test_step_preset_tells_it_for_native_samplers(client, graph):
    preset = node(
        "QwenEditStepPreset", model=["loader", 0], latent=["encode", 2], preset="Lightning 8",
        steps=0, true_cfg_scale=0.0, shift=0.0,
    )  # fmt: skip
    native = node(
        "KSampler", model=["preset", 0], seed=3, steps=["preset", 2], cfg=["preset", 3], sampler_name="euler",
        scheduler="simple", positive=["encode", 0], negative=["encode", 1], latent_image=["encode", 2], denoise=1.0,
    )  # fmt: skip
    result = run_fresh(client, graph | {"preset": preset, "sampler": native})
    assert found(client, result) == [("lightning-missing", "preset")]
    assert "Warning: 8 steps without guidance need Lightning" in note(result, "preset")


def test_a_list_of_edits_tells_it_once(client, server, graph):
    twice = changed(graph, "encode", negative="one finding for two edits")
    twice["batch"] = node("ImageBatch", image1=["picture_1", 0], image2=["picture_1", 0])
    twice = changed(twice, "encode", **{"pictures.picture_1": ["batch", 0]})
    twice = changed(twice, "sampler", preset="Lightning 4", steps=0)
    before = server.log.read_text(errors="replace").count("need Lightning")
    result = run_fresh(client, twice)
    assert found(client, result) == [("lightning-missing", "sampler")]
    assert server.log.read_text(errors="replace").count("need Lightning") == before + 1


def test_the_answers_shape_and_no_path_in_it(client, server, host, models, graph):
    run_fresh(client, changed(with_switch(graph, lora_1=LIGHTNING), "loader", attention="cudnn"))
    answer = doctor(client)
    assert set(answer) == {"prompt_id", "findings", "environment"}
    for finding in answer["findings"]:
        assert set(finding) == {"code", "severity", "sentence", "node_id"}
        assert all(isinstance(value, str) for value in finding.values())
    assert ("attention-fell-back", "loader") in found(client)
    environment = answer["environment"]
    assert environment["card"] == "cpu"
    assert environment["total_memory_gib"] > 0
    assert re.match(r"\d+\.\d+", environment["torch"])
    assert set(environment) == {"card", "total_memory_gib", "torch", "comfyui", "comfy_kitchen", "flags", "models"}
    demo = [m for m in environment["models"] if m["model"] == "demo_model"]
    assert {m["attention"] for m in demo} == {"pytorch"}
    assert any("cudnn does not run here" in m["attention_why"] for m in demo)
    assert set(demo[0]) == {
        "model", "version", "version_by", "precision", "attention", "attention_why", "kernels", "kernels_why",
    }  # fmt: skip
    text = json.dumps(answer)
    assert not [str(p) for p in (REPO, host.comfyui, models, server.user) if str(p) in text]
    assert not re.search(r"(?<!\w)/\w+/|[A-Z]:\\", text)


def test_requests_are_checked(client, server, graph):
    run_fresh(client, graph)
    assert status(server, "prompt_id=unknown")[0] == 404
    for query in ("prompt_id=", "prompt_id=" + "x" * 129, "prompt_id=a&prompt_id=b", "path=/etc/passwd"):
        code, answer = status(server, query)
        assert code == 400, query
        assert answer["error"].startswith("[QE_INPUT]")


def test_options_of_the_command_line_are_told(start_server):
    server = start_server("--fast", "fp16_accumulation", "--whitelist-custom-nodes", PACK_NAME)
    with ArrayClient(server.url) as client:
        answer = doctor(client)
        assert (answer["prompt_id"], answer["findings"]) == (None, [])
        assert answer["environment"]["flags"] == ["--fast fp16_accumulation"]
        result = client.run(small_edit(client), timeout_s=120)
        assert found(client, result) == [("server-flags", "loader")]
        assert "Note: ComfyUI runs with --fast fp16_accumulation" in note(result, "loader")
