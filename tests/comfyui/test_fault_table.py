"""Faults around the edit on the real server: LoRA files, odd tensors, memory, disks, links in the model folders.

With ``test_faults.py`` the whole table that benchmarks/faults.py prints. After each fault the good edit is as before.
"""

import os
import shutil
import time

import gguf_files
import numpy as np
import pytest
import torch
from comfy_process import run_in_comfyui
from edits import between, changed, edited, failure, picture, refusal, run_fresh, small_edit, starved
from graphs import node
from safetensors.torch import save_file
from test_faults import BAD_FILES, switch_inputs, with_picture
from test_lora import RANK, lora_state

pytestmark = [pytest.mark.server, pytest.mark.slow]


# LoRA files


def with_lora(graph, name: str):
    return between(graph, ("loader", 0), "QwenEditLoraSwitch", "model", **switch_inputs(name))


@pytest.mark.parametrize("kind", ["web page", "lfs pointer", "pickle", "truncated", "trailing bytes", "huge header"])
def test_a_bad_file_chosen_as_lora_is_refused_by_name(client, graph, good, models, kind):
    make, message = BAD_FILES[kind]
    path = models / "loras" / f"bad file {kind}.safetensors"
    make(path)
    said = failure(client, with_lora(graph, path.name))
    assert said.startswith("[QE_WEIGHTS]")
    assert path.stem in said
    assert message in said


def test_a_missing_alpha_means_the_rank(client, graph, good, models):
    plain = {
        key.replace("lora_A", "lora_down")
        .replace("lora_B", "lora_up")
        .replace("transformer.", "diffusion_model.", 1): t
        for key, t in lora_state(1).items()
    }
    alphas = {k.replace("lora_down.weight", "alpha"): torch.tensor(float(RANK)) for k in plain if "lora_down" in k}
    save_file(plain, models / "loras" / "alpha missing.safetensors")
    save_file(plain | alphas, models / "loras" / "alpha is rank.safetensors")
    missing, given = (edited(client, with_lora(graph, f"alpha {n}.safetensors")) for n in ("missing", "is rank"))
    assert np.array_equal(missing, given)
    assert not np.array_equal(missing, good)


# Pictures


def test_a_half_precision_picture_is_taken_and_the_input_is_not_changed(client, graph, good):
    odd = with_picture(graph, "1,64,64,3", "0.25")
    whole = edited(client, odd)
    odd["odd"]["inputs"]["dtype"] = "float16"
    assert np.array_equal(edited(client, odd), whole)
    before = with_picture(graph, "1,63,65,4", "0.25")
    rgba = before | {"kept": node("ProbeUnchanged", image=["odd", 0], after=["sampler", 0])}
    assert run_fresh(client, rgba).images()


def test_a_list_of_pictures_of_different_sizes_is_an_edit_of_each(client, graph, good):
    sizes = ("1,64,64,3", "1,96,48,3")
    alone = [edited(client, with_picture(graph, shape, "ramp")) for shape in sizes]
    both = with_picture(graph, ";".join(sizes), "ramp")
    both["odd"]["class_type"] = "ProbePictureList"
    # a list is handed on as it is, while a batch of different sizes can't be made: ImageBatch resizes the second
    together = client.arrays(client.run(changed(both, "sampler", seed=int(np.random.default_rng().integers(2**32)))))
    assert [array.shape for array in together] == [array.shape for array in alone]
    together = client.arrays(client.run(both))
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)


def test_a_batch_goes_through_smart_resize_and_back_each_to_its_own_source(client, graph, good):
    """As an animated picture in Load Image, or ComfyUI's Batch Images. A mask of nothing leaves the sources as they are."""
    batch = with_picture(graph, "2,40,72,3", "ramp")
    batch["resize"] = node(
        "QwenEditSmartResize", image=["odd", 0], target="longest side", megapixels=1.0, longest_side=64, fit="crop"
    )
    batch["nothing"] = node("SolidMask", value=0.0, width=72, height=40)
    batch["back"] = node(
        "QwenEditRestoreSize", image=["decode", 0], geometry=["resize", 1], mask=["nothing", 0], feather=0
    )
    batch = changed(batch, "encode", **{"pictures.picture_1": ["resize", 0]})
    restored = client.arrays(run_fresh(client, changed(batch, "save", images=["back", 0])))
    sources = client.arrays(run_fresh(client, changed(batch, "save", images=["odd", 0])))
    assert len(restored) == len(sources) == 2
    for back, source in zip(restored, sources, strict=True):
        assert np.array_equal(back, source)
    assert not np.array_equal(*sources)


def test_a_side_of_20000_pixels_is_reduced_before_the_vae(host):
    """What Encode gives the VAE, for result and reference. Encoding as much for real takes 9 GiB on a CPU."""
    found = run_in_comfyui(
        host,
        """
from pack.nodes.host.encoding import REFERENCE_SIZES, output_size, reference_size
for width, height in ((20000, 1000), (1000, 20000), (20000, 20000), (20000, 1)):
    *size, notes = output_size(0, 0, (width, height))
    references = [reference_size(rule, n, width / height, *size) for rule in REFERENCE_SIZES for n in (0, 1)]
    print(max(w * h for w, h in (size, *references)) / 2**20, notes)
""",
    )
    *large, thin = found.splitlines()
    for line in large:
        megapixels, said = line.split(" ", 1)
        assert 3.5 < float(megapixels) < 4.3
        assert "Warning: reduced to 4 megapixels (scale 0." in said
    assert float(thin.split(" ")[0]) < 4.3


# Memory


def said_on(client, before: int, which: str) -> list[str]:
    return [e.data["text"] for e in client.events[before:] if e.type == "progress_text" and e.data["node"] == which]


@pytest.mark.parametrize("kind", ["raised", "allocated"])
def test_memory_that_runs_out_once_costs_a_retry_that_is_said(client, graph, good, kind):
    before = len(client.events)
    retried = edited(client, starved(graph, 1, kind))
    assert np.abs(retried - good).max() <= 1 / 255
    assert [
        t for t in said_on(client, before, "sampler") if t.startswith("Out of memory: trying once more with the MLPs")
    ]


@pytest.mark.parametrize("kind", ["raised", "allocated"])
def test_memory_that_runs_out_twice_is_an_error_with_a_word_and_the_next_edit_works(client, graph, good, kind):
    said = failure(client, starved(graph, 2, kind))
    assert said.startswith("[QE_MEMORY]")
    assert "stream" in said


def test_a_batch_too_large_for_memory_runs_one_by_one(client, graph, good):
    pair = between(graph, ("encode", 2), "ProbeDamage", "latent", kind="twice")
    whole = client.arrays(run_fresh(client, pair))
    before = len(client.events)
    parts = client.arrays(run_fresh(client, starved(pair, 10**6, "batch")))
    assert len(parts) == 2
    for one, other in zip(whole, parts, strict=True):
        assert np.abs(one - other).max() <= 1 / 255
    assert [t for t in said_on(client, before, "sampler") if "with its 2 pictures one by one and" in t]
    edited(client, starved(graph, 1, "raised"))  # the probe of the batch is gone with this one


# Disks

LOGGED = node("QwenEditPerfLogger", value=["sampler", 0], label="disk", include_text=False)


@pytest.fixture
def log_folder(client, server, graph):
    """The performance log's folder, taken away for a test to put something in its place.

    First it is written to: then no record of an earlier prompt is still to come, and no earlier warning counts.
    """
    folder, aside = server.output / "qwen_edit_perf", server.output / "aside"
    log = folder / "perf.jsonl"
    prompt = client.queue(graph | {"log": LOGGED})
    client.wait(prompt)
    until = time.monotonic() + 30
    while not (log.exists() and prompt in log.read_text(encoding="utf-8")):
        assert time.monotonic() < until, "no record"
        time.sleep(0.1)
    folder.rename(aside)
    yield folder
    shutil.rmtree(folder, ignore_errors=True) if not folder.is_symlink() else folder.unlink()
    aside.rename(folder)


def full_disk(folder):
    folder.mkdir()
    (folder / "perf.jsonl").symlink_to("/dev/full")


def read_only(folder):
    if os.geteuid() == 0:  # whom no permission stops
        folder.symlink_to("/sys")
    else:
        folder.mkdir(mode=0o555)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
@pytest.mark.parametrize("make", [full_disk, read_only])
def test_a_log_that_cannot_be_written_costs_one_warning_and_no_picture(client, server, graph, good, log_folder, make):
    def said() -> int:
        return server.log.read_text(errors="replace").count("cannot be written")

    before = said()
    make(log_folder)
    for _ in range(3):
        assert np.array_equal(edited(client, graph | {"log": LOGGED}), good)
    until = time.monotonic() + 10  # a record is written after its prompt has ended
    while said() == before and time.monotonic() < until:
        time.sleep(0.1)
    assert said() - before == 1


# Links


@pytest.fixture
def links(models):
    outside = models / "outside"
    outside.mkdir(exist_ok=True)
    save_file(lora_state(1), outside / "linked.safetensors")
    save_file(lora_state(2), models / "beside.safetensors")
    if not (models / "loras" / "links").exists():
        (models / "loras" / "links").symlink_to(outside, target_is_directory=True)
    return models


def test_links_of_the_owner_are_followed_and_no_path_leads_on_from_them(client, graph, good, links):
    """What the owner of the machine links into a model folder is offered, as by ComfyUI's own loaders; what a workflow
    makes of such a name is not."""
    assert not np.array_equal(edited(client, with_lora(graph, os.path.join("links", "linked.safetensors"))), good)
    for value in (
        "links/../beside.safetensors",
        "links/../../beside.safetensors",
        "links/./linked.safetensors",
        "links",
    ):
        switched = with_lora(graph, value)
        assert "lora_1" in refusal(client, switched)
        switched["between"]["inputs"]["lora_1"] = ["text", 0]
        switched["text"] = node("ProbeText", text=value)
        assert "[QE_INPUT]" in failure(client, switched)


def test_a_folder_whose_index_leads_outside_is_refused(client, graph, good, models):
    from test_faults import DEMO

    folder = models / "diffusers" / "leads outside"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("loras"))
    index = '{"weight_map": {"a": "../../../beside.safetensors"}}'
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    said = failure(client, changed(graph, "loader", model="folder: leads outside"))
    assert said.startswith("[QE_WEIGHTS]")
    assert "files of other folders" in said


# Text encoders in GGUF


@pytest.mark.parametrize(
    ("name", "architecture", "parts"),
    [
        ("alone-Q8_0.gguf", "qwen2vl", ["[QE_WEIGHTS] alone-Q8_0.gguf reads text only", "mmproj"]),
        ("llama-Q8_0.gguf", "llama", ["[QE_WEIGHTS] llama-Q8_0.gguf", "found the architecture 'llama'"]),
        ("../encoder.GGUF", None, ["[QE_INPUT]", "is not in ComfyUI's folders"]),
    ],
)
def test_a_text_encoder_in_gguf_that_can_not_be_used(client, graph, good, models, name, architecture, parts):
    if architecture is not None:
        words = {"token_embd.weight": torch.zeros(8, 64)}
        gguf_files.write(models / "text_encoders" / name, words, lambda *_: "Q8_0", architecture=architecture)
    linked = changed(graph, "loader", text_encoder=["text", 0]) | {"text": node("ProbeText", text=name)}
    said = failure(client, linked)
    assert said.startswith(parts[0])
    assert parts[1] in said


def test_the_picture_itself(client, good):
    """Not vacuous: another picture gives another edit."""
    assert not np.array_equal(edited(client, small_edit(client, picture(3))), good)
