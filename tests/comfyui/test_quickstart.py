"""quickstart.py as a person runs it, with the Python and the ComfyUI that the tests run with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_host import SCRIPTS, Host
from PIL import Image

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture
def quickstart(host: Host, tmp_path: Path):
    """Runs quickstart.py with further arguments, from and in a folder of its own."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            SCRIPTS / "quickstart.py",
            "--python",
            host.python,
            "--comfyui",
            host.comfyui,
        ]
        environment = os.environ | {"QWEN_EDIT_FAST_CACHE": str(tmp_path / "cache")}
        return subprocess.run(
            [*command, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            cwd=tmp_path,
            env=environment,
        )

    return run


def test_the_defaults_edit_the_example_and_show_where_the_time_went(quickstart, tmp_path):
    done = quickstart()
    assert done.returncode == 0, done.stderr
    edited = Image.open(tmp_path / "quickstart_output" / "edited.png")
    both = Image.open(tmp_path / "quickstart_output" / "edited_before_after.png")
    assert "the size of the input" in done.stdout
    assert both.height == edited.height
    assert both.width > 2 * edited.width
    for stage in ("load", "denoise", "decode", "total"):
        assert f"\n{stage} " in done.stdout
    assert done.stdout.rstrip().endswith("ComfyUI has stopped")


def test_an_upright_photograph_of_odd_size_keeps_its_size(quickstart, tmp_path):
    image = Image.new("RGB", (201, 133), (40, 120, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    image.save(tmp_path / "phone.jpg", exif=exif)
    arguments = ["--image", tmp_path / "phone.jpg", "--preset", "Lightning 4", "--output", "edited.png"]
    done = quickstart(*arguments, "--prompt", "invert the colours", "--seed", 5)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "edited.png").size == (133, 201)


def test_a_preset_that_does_not_exist_ends_it_and_stops_the_server(quickstart):
    done = quickstart("--preset", "fastest")
    assert done.returncode == 1
    assert "'fastest' not in" in done.stderr
    assert "Traceback" not in done.stderr
    assert "ComfyUI has stopped" in done.stdout
