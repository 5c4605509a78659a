"""Start-up: no flag that the ComfyUI at hand lacks, and a Dockerfile whose steps can be followed."""

import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from comfy_host import REPO, Host, HostError, cache_folder, find_comfyui
from launch_comfyui import Card, Choice, around, checked, plan

CARDS = [Card("none", 0), Card("RTX 3060", 12), Card("RTX 4090", 24), Card("H100", 80)]
ROOT = "/opt/ComfyUI"
PACK = f"{ROOT}/custom_nodes/comfyui-qwen-edit-fast"


@pytest.fixture(scope="module")
def comfyui() -> Host:
    folder = find_comfyui(None, cache_folder())
    assert folder is not None
    return Host(Path(sys.executable), folder)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_comfyui_has_every_flag_that_is_planned(comfyui: Host, card: Card):
    flags = plan(card, headless=True).flags
    kept, lacking = checked(comfyui, flags, ["--port", "8190"])
    assert kept == list(flags)
    assert not lacking


@pytest.mark.slow
def test_comfyui_starts_as_planned_and_with_the_flags_given_by_hand(comfyui: Host, tmp_path: Path):
    script = [sys.executable, REPO / "scripts" / "launch_comfyui.py", "--comfyui", comfyui.comfyui, "--run"]
    flags = ["--quick-test-for-ci", "--disable-all-custom-nodes", "--database-url", "sqlite:///:memory:"]
    command = [*script, "--", *flags, "--base-directory", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ComfyUI version: " in done.stdout + done.stderr
    assert "Skipping loading of custom nodes" in done.stdout + done.stderr


def test_an_installed_pack_knows_its_comfyui():
    assert around(Path("/x/ComfyUI/custom_nodes/pack")) == str(Path("/x/ComfyUI"))
    assert around(Path("/x/pack")) is None


def test_what_this_comfyui_lacks_is_left_out_and_named(comfyui: Host):
    old = Choice(("--medvram",), "of another program")
    assert checked(comfyui, [old, Choice(("--highvram",), "")], []) == ([Choice(("--highvram",), "")], [old])


@pytest.mark.parametrize("extra", [["--gpu-device-id", "0"], ["--disable-xformers=1"], ["--lowvram", "--novram"]])
def test_what_its_parser_refuses_is_refused(comfyui: Host, extra: list[str]):
    with pytest.raises(HostError, match="does not take these flags"):
        checked(comfyui, [Choice(("--highvram",), "")], extra)


def test_a_flag_given_by_hand_wins(comfyui: Host):
    flags = [Choice(("--preview-method", "latent2rgb"), "")]
    assert checked(comfyui, flags, ["--preview-method", "none"]) == ([], [])
    assert checked(comfyui, flags, ["--preview-method=none"]) == ([], [])


@pytest.mark.parametrize(
    ("ours", "given"), [("--highvram", "--lowvram"), ("--use-pytorch-cross-attention", "--use-sage-attention")]
)
def test_a_flag_given_by_hand_wins_over_one_that_it_excludes(comfyui: Host, ours: str, given: str):
    other = Choice(("--disable-auto-launch",), "")
    assert checked(comfyui, [Choice((ours,), ""), other], [given]) == ([other], [])


def test_without_a_card_a_flag_for_cards_is_refused(comfyui: Host):
    with pytest.raises(HostError, match="does not take these flags"):
        checked(comfyui, plan(Card("none", 0)).flags, ["--lowvram"])


@pytest.fixture
def planned(comfyui: Host, tmp_path: Path):
    """What the script plans on a machine whose nvidia-smi answers with the card that it is asked for."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\nfor word; do case $word in --id=*) echo "Card ${word#--id=}, 24564";; esac; done\n')
    program.chmod(0o755)

    def run(*arguments: str, **environment: str) -> list[str]:
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "HF_HUB"))}
        command = [sys.executable, REPO / "scripts" / "launch_comfyui.py", "--comfyui", comfyui.comfyui, *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=kept | {"PATH": path} | environment
        )
        return done.stdout.splitlines()

    return run


@pytest.mark.skipif(os.name == "nt", reason="the card is played by a shell script")
class TestWhatIsSetAlready:
    def test_nothing(self, planned):
        said = planned()
        assert said[0] == "Card: Card 0, 24 GiB"
        assert said[-1].startswith("CUDA_DEVICE_ORDER=PCI_BUS_ID HF_HUB_OFFLINE=1")
        assert "--cuda-device 0" in said[-1]

    def test_the_order_of_the_cards_wins_and_is_said(self, planned):
        """Then the number is not nvidia-smi's, so torch is asked, which sees no card here."""
        said = planned(CUDA_DEVICE_ORDER="FASTEST_FIRST", CUDA_VISIBLE_DEVICES="GPU-1234")
        (line,) = [line for line in said[:-1] if "CUDA_DEVICE_ORDER" in line]
        assert line.split() == [
            "CUDA_DEVICE_ORDER=FASTEST_FIRST",
            "as",
            "it",
            "is",
            "set",
            "already;",
            "this",
            "script",
            "would",
            "set",
            "PCI_BUS_ID",
        ]
        assert said[-1].startswith("CUDA_DEVICE_ORDER=FASTEST_FIRST ")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="torch would find a card")
    def test_a_number_in_another_order_is_not_taken_for_that_of_nvidia_smi(self, planned):
        assert planned(CUDA_DEVICE_ORDER="FASTEST_FIRST")[0] == "Card: none"

    @pytest.mark.parametrize(("visible", "card"), [("2,3", "Card 2"), ("GPU-1234", "Card GPU-1234")])
    def test_cards_that_a_scheduler_left_stay_the_ones(self, planned, visible, card):
        said = planned(CUDA_VISIBLE_DEVICES=visible)
        assert said[0] == f"Card: {card}, 24 GiB"
        assert "--cuda-device" not in said[-1]
        assert "--cuda-device 1" in planned("--device", "1", CUDA_VISIBLE_DEVICES=visible)[-1]

    def test_another_machine_is_planned_without_them(self, planned):
        said = planned(
            "--card", "RTX 4070", "--memory", "12", CUDA_DEVICE_ORDER="FASTEST_FIRST", CUDA_VISIBLE_DEVICES="2"
        )
        assert said[-1].startswith("CUDA_DEVICE_ORDER=PCI_BUS_ID ")
        assert "--cuda-device 0" in said[-1]


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", (REPO / "Dockerfile").read_text("utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def only(kind: str) -> str:
    (found,) = [rest for name, rest in instructions() if name == kind]
    return found


def here(path: str, comfyui: Host) -> str:
    """What a path of the image is on this machine."""
    if path.startswith("custom_nodes/"):
        path = f"{ROOT}/{path}"
    if path.startswith(PACK):
        return str(REPO) + path.removeprefix(PACK)
    return str(comfyui.comfyui) if path == ROOT else path


def test_copied_files_are_there_and_not_ignored():
    ignored = [line for line in (REPO / ".dockerignore").read_text("utf-8").splitlines() if line and line[0] != "#"]
    for kind, rest in instructions():
        if kind == "COPY":
            source = rest.split()[0]
            assert (REPO / source).exists()
            assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored)
    for needed in ("nodes", "qwen_edit", "scripts", "web", "locales", "workflows", "demo_model", "requirements.txt"):
        assert (REPO / needed).exists()
        assert needed not in ignored


def test_scripts_that_the_image_runs_do_what_it_asks_of_them(comfyui: Host, tmp_path: Path):
    """Its Python one-liners, with the download taken as done."""
    (snippet,) = [
        part for _, rest in instructions() for part in re.findall(r'python -c "(.*?)"', rest) if "fetch" in part
    ]
    fetched = tmp_path / "ComfyUI-0.30.0"
    (fetched / "comfy").mkdir(parents=True)
    for name in ("main.py", "requirements.txt"):
        (fetched / name).touch()
    code = snippet.replace("/opt/ComfyUI", str(tmp_path / "ComfyUI")).replace("/opt", str(tmp_path))
    subprocess.run([sys.executable, "-c", code], cwd=REPO / "scripts", check=True)
    assert (tmp_path / "ComfyUI" / "main.py").is_file()


def test_requirements_that_the_image_installs_are_satisfied_here(comfyui: Host):
    """pip can read the files, and finds nothing to install in an environment that was made from them."""
    files = {path for _, rest in instructions() for path in re.findall(r"-r (\S+)", rest)}
    places = [here(path.replace("/tmp", PACK), comfyui).replace(ROOT, str(comfyui.comfyui)) for path in sorted(files)]
    assert len(places) == 3
    arguments = [word for place in places for word in ("-r", place)]
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--dry-run", "--quiet", *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def test_the_image_starts_comfyui_with_flags_that_it_has(comfyui: Host):
    words = json.loads(only("ENTRYPOINT")) + json.loads(only("CMD"))
    assert words[0] == "python"
    words = [here(word, comfyui) for word in words[1:] if word != "--run"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[command.index("--port") + 1] == only("EXPOSE")
    assert {"--disable-auto-launch", "--listen"} <= set(command)


def test_compose_file_and_image_agree():
    compose = yaml.safe_load((REPO / "compose.yaml").read_text("utf-8"))
    (service,) = compose["services"].values()
    assert service["build"] == "."
    assert service["ports"] == [f"127.0.0.1:{only('EXPOSE')}:{only('EXPOSE')}"]
    owned = only_run_with("chown")
    for volume in service["volumes"]:
        source, target = volume.split(":")
        assert source.startswith("./") or source in compose["volumes"]
        assert target in owned


def only_run_with(word: str) -> str:
    (found,) = [rest for kind, rest in instructions() if kind == "RUN" and word in rest]
    return found
