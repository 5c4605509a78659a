"""QwenEditSave against ComfyUI's own Save Image: the same pixels, the same workflow in the file, other bytes."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from array_client import to_png
from comfy_client import ExecutionFailed
from edits import picture
from graphs import node
from PIL import Image

pytestmark = pytest.mark.server

WEBP, PNG = "webp, lossless", "png"


def graph(client, *pictures, format=WEBP, prefix="kept", **more):
    """Pictures of one size as one batch, saved by both."""
    names = [client.upload_array(p) for p in pictures]
    made = {f"load{i}": node("LoadImage", image=name) for i, name in enumerate(names)}
    last = ["load0", 0]
    for i in range(1, len(names)):
        made[f"both{i}"] = node("ImageBatch", image1=last, image2=[f"load{i}", 0])
        last = [f"both{i}", 0]
    return made | more | {
        "theirs": node("SaveImage", images=last, filename_prefix="theirs"),
        "ours": node("QwenEditSave", images=last, filename_prefix=prefix, format=format),
    }  # fmt: skip


def files(client, result, which):
    """Bytes of what a node saved, by name."""
    return {image.filename: client.download(image) for image in result.images() if image.node == which}


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("format", [WEBP, PNG])
def test_every_pixel_is_that_of_save_image(client, format):
    workflow = graph(client, picture(1, 96, 64), picture(2, 96, 64), format=format)
    result = client.run(workflow)
    ours, theirs = files(client, result, "ours"), files(client, result, "theirs")
    assert len(ours) == len(theirs) == 2
    for mine, native in zip(ours.values(), theirs.values(), strict=True):
        found = opened(mine)
        assert found.format == ("WEBP" if format == WEBP else "PNG")
        assert found.size == (96, 64)
        assert not getattr(found, "is_animated", False)
        assert np.array_equal(np.array(found.convert("RGB")), np.array(opened(native).convert("RGB")))


def test_the_workflow_is_in_the_file(client):
    workflow = graph(client, picture(3))
    (data,) = files(client, client.run(workflow), "ours").values()
    prompt = opened(data).getexif()[0x0110]  # where ComfyUI's page looks for it
    assert json.loads(prompt.removeprefix("prompt:"))["ours"] == workflow["ours"]


def test_files_are_numbered_on_and_lie_in_folders(client):
    names = []
    for seed in (4, 5):
        names += files(client, client.run(graph(client, picture(seed), prefix="folder/edit")), "ours")
    first, second = (int(name.split("_")[1]) for name in names)
    assert second == first + 1


@pytest.mark.parametrize("format", [WEBP, PNG])
def test_no_file_is_overwritten_and_folders_are_named_by_what_is_in_them(client, server, format):
    prefix = f"{format[:3]} %width%x%height%/%batch_num%"
    names = []
    for seed in (6, 8):
        workflow = graph(client, picture(seed, 96, 64), picture(seed + 1, 96, 64), format=format, prefix=prefix)
        del workflow["theirs"]
        names += files(client, client.run(workflow), "ours")
    assert sorted(name.split(".")[0] for name in names) == ["0_00001_", "0_00002_", "1_00001_", "1_00002_"]
    assert [p.name for p in server.output.glob(f"{format[:3]} *")] == [f"{format[:3]} 96x64"]
    assert not list(server.output.glob("*0x0*"))


def test_transparency_is_kept(client):
    rgba = np.dstack([picture(8), np.linspace(0, 1, 64)[:, None].repeat(64, 1)])
    workflow = graph(client, picture(8))
    workflow["load0"] = node("LoadImage", image=client.upload(to_png(rgba), "rgba.png"))
    workflow["alpha"] = node("JoinImageWithAlpha", image=["load0", 0], alpha=["load0", 1])
    workflow["ours"]["inputs"]["images"] = workflow["theirs"]["inputs"]["images"] = ["alpha", 0]
    result = client.run(workflow)
    (ours,), (theirs,) = (files(client, result, which).values() for which in ("ours", "theirs"))
    assert opened(ours).mode == opened(theirs).mode == "RGBA"
    assert np.array_equal(np.array(opened(ours)), np.array(opened(theirs)))


def test_what_webp_can_not_hold_is_a_png(client):
    workflow = graph(client, picture(9, 16384, 8))
    (data,) = files(client, client.run(workflow), "ours").values()
    assert opened(data).format == "PNG"
    assert opened(data).size == (16384, 8)


@pytest.mark.parametrize("prefix", ["../out", "/tmp/out", "a/../../out", "with\0zero", "long" * 100])
def test_nothing_is_written_outside_the_output_folder(client, server, tmp_path, prefix):
    outside = [server.output.parent, tmp_path.parent, Path("/tmp")]
    before = [{p.name for p in folder.iterdir() if "out" in p.name} for folder in outside]
    workflow = graph(client, picture(10), prefix=prefix)
    del workflow["theirs"]
    with pytest.raises(ExecutionFailed) as failed:
        client.run(workflow)
    assert failed.value.details["exception_message"].startswith("[QE_INPUT] filename_prefix")
    assert before == [{p.name for p in folder.iterdir() if "out" in p.name} for folder in outside]


def test_a_folder_that_is_a_file_is_refused(client, server):
    (server.output / "a file").write_bytes(b"")
    workflow = graph(client, picture(12), prefix="a file/x/edit")
    del workflow["theirs"]
    with pytest.raises(ExecutionFailed) as failed:
        client.run(workflow)
    assert failed.value.details["exception_message"].startswith("[QE_INPUT] filename_prefix")


@pytest.mark.parametrize(
    ("shape", "fill", "said"),
    [("1,8,8,3", "nan", "[QE_NAN]"), ("0,8,8,3", "0.5", "[QE_INPUT]"), ("1,8,8,2", "0.5", "[QE_INPUT]")],
)
def test_what_is_no_picture_is_not_saved(client, shape, fill, said):
    save = node("QwenEditSave", images=["odd", 0], filename_prefix="odd", format=WEBP)
    with pytest.raises(ExecutionFailed) as failed:
        client.run({"odd": node("ProbePicture", shape=shape, fill=fill), "ours": save})
    assert failed.value.details["exception_message"].startswith(said)


def test_half_precision_is_saved(client):
    odd = node("ProbePicture", shape="1,8,8,3", fill="0.5", dtype="bfloat16")
    save = node("QwenEditSave", images=["odd", 0], filename_prefix="half", format=WEBP)
    (data,) = files(client, client.run({"odd": odd, "ours": save}), "ours").values()
    assert np.unique(np.array(opened(data).convert("RGB"))).tolist() == [127]
