"""Set-up without a network: what is refused, what is atomic, what is done only once."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

import comfy_host
import pytest
from comfy_host import HostError

PREFIX = PurePosixPath("package/vendor/ComfyUI")


def make_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def make_comfyui(folder: Path) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "requirements.txt").touch()
    return folder


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (2, 7)])
def test_another_python_is_refused_with_what_to_install(version):
    with pytest.raises(HostError, match=r"Python 3\.11, 3\.12 or 3\.13"):
        comfy_host.check_python(version)


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_supported_pythons_are_accepted(version):
    comfy_host.check_python(version)


def test_the_scripts_need_only_the_standard_library():
    names = "comfy_host, comfy_server, comfy_client, comfy_socket, edit_job, queue_edit, quickstart, run_tests"
    # -S leaves site-packages out.
    subprocess.run([sys.executable, "-S", "-c", f"import {names}"], cwd=comfy_host.SCRIPTS, check=True)


def test_a_comfyui_folder_is_recognised(tmp_path):
    assert comfy_host.validate_comfyui(make_comfyui(tmp_path / "ComfyUI")) == (tmp_path / "ComfyUI").resolve()


def test_a_folder_that_is_not_comfyui_is_refused_with_what_is_missing(tmp_path):
    (tmp_path / "main.py").touch()
    with pytest.raises(HostError, match="has no comfy and no requirements"):
        comfy_host.validate_comfyui(tmp_path)
    with pytest.raises(HostError, match="There is no folder"):
        comfy_host.validate_comfyui(tmp_path / "absent")


def test_an_argument_wins_over_the_environment_and_both_over_the_cache(tmp_path, monkeypatch):
    named, environment = make_comfyui(tmp_path / "named"), make_comfyui(tmp_path / "environment")
    fetched = make_comfyui(tmp_path / f"ComfyUI-{comfy_host.COMFYUI_VERSION}")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    assert comfy_host.find_comfyui(None, tmp_path) == fetched
    assert comfy_host.find_comfyui(None, tmp_path / "empty") is None
    monkeypatch.setenv("COMFYUI_PATH", str(environment))
    assert comfy_host.find_comfyui(None, tmp_path) == environment
    assert comfy_host.find_comfyui(str(named), tmp_path) == named


def test_a_changed_archive_is_refused(tmp_path):
    archive = make_archive(tmp_path / "a.tar.gz", {"x": b"1"})
    comfy_host.verify_hash(archive, comfy_host.hash_file(archive))
    with pytest.raises(HostError, match="SHA-256"):
        comfy_host.verify_hash(archive, comfy_host.COMFYUI_SHA256)


def test_only_the_vendored_part_is_unpacked(tmp_path):
    files = {f"{PREFIX}/main.py": b"main", f"{PREFIX}/comfy/sd.py": b"sd", "package/setup.py": b"no"}
    archive = make_archive(tmp_path / "a.tar.gz", files)
    destination = tmp_path / "ComfyUI"
    comfy_host.unpack(archive, PREFIX, destination)
    found = sorted(str(p.relative_to(destination)) for p in destination.rglob("*") if p.is_file())
    assert found == [str(Path("comfy/sd.py")), "main.py"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ComfyUI", "a.tar.gz"]


def test_a_cut_off_archive_leaves_nothing_behind(tmp_path):
    data = {f"{PREFIX}/{n}.bin": os.urandom(50_000) for n in range(20)}
    archive = make_archive(tmp_path / "a.tar.gz", data)
    archive.write_bytes(archive.read_bytes()[:300_000])
    with pytest.raises((EOFError, tarfile.ReadError)):
        comfy_host.unpack(archive, PREFIX, tmp_path / "ComfyUI")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


def test_a_name_that_leaves_the_folder_is_refused(tmp_path):
    archive = make_archive(tmp_path / "a.tar.gz", {f"{PREFIX}/../../../escaped": b"x"})
    with pytest.raises(HostError, match="points outside"):
        comfy_host.unpack(archive, PREFIX, tmp_path / "ComfyUI")
    assert not list(tmp_path.rglob("escaped"))


def test_unpacking_beside_another_process_keeps_the_first(tmp_path):
    destination = tmp_path / "ComfyUI"
    destination.mkdir()
    (destination / "first").touch()
    comfy_host.unpack(make_archive(tmp_path / "a.tar.gz", {f"{PREFIX}/main.py": b""}), PREFIX, destination)
    assert [p.name for p in destination.iterdir()] == ["first"]


@pytest.fixture
def pip_calls(monkeypatch) -> list[tuple]:
    calls: list[tuple] = []
    monkeypatch.setattr(comfy_host, "run_pip", lambda python, *arguments: calls.append(arguments))
    monkeypatch.setattr(comfy_host, "check_disk", lambda folder: None)
    return calls


def test_requirements_are_installed_once_and_again_when_they_change(tmp_path, pip_calls):
    one, two, stamp = tmp_path / "one.txt", tmp_path / "two.txt", tmp_path / "installed.json"
    one.write_text("a\n")
    two.write_text("b\n")
    python = Path(sys.executable)
    assert comfy_host.install(python, [one, two], stamp)
    assert not comfy_host.install(python, [one, two], stamp)
    assert not comfy_host.install(python, [one], stamp)
    two.write_text("b>=2\n")
    assert comfy_host.install(python, [one, two], stamp)
    assert len(pip_calls) == 2


def test_a_failed_installation_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(comfy_host, "check_disk", lambda folder: None)
    requirement, stamp = tmp_path / "one.txt", tmp_path / "installed.json"
    requirement.write_text("-r absent.txt\n")
    with pytest.raises(HostError, match="pip failed"):
        comfy_host.install(Path(sys.executable), [requirement], stamp)
    assert not stamp.exists()


def test_a_full_disk_is_said_before_anything_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(comfy_host, "NEEDED_GIB", 10**9)
    with pytest.raises(HostError, match="GiB free"):
        comfy_host.ensure_venv(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_a_python_without_the_requirements_is_refused_with_the_command(tmp_path):
    import venv

    venv.create(tmp_path / "venv", with_pip=False, symlinks=os.name != "nt")
    python = comfy_host.venv_python(tmp_path / "venv")
    with pytest.raises(HostError, match=r"has no torch, .*\n.*-m pip install -r"):
        comfy_host.check_imports(python, tmp_path)


def test_a_python_that_is_not_there_is_said(tmp_path):
    with pytest.raises(HostError, match="There is no Python"):
        comfy_host.find_python(str(tmp_path / "python"))


def test_the_pack_is_linked_under_its_name_and_only_once(tmp_path):
    link = comfy_host.link_pack(tmp_path / "custom_nodes")
    assert link.name == "comfyui-qwen-edit-fast"
    assert link.resolve() == comfy_host.REPO
    assert comfy_host.link_pack(tmp_path / "custom_nodes") == link


def test_a_folder_in_the_place_of_the_link_is_left_alone(tmp_path):
    (tmp_path / comfy_host.PACK_NAME).mkdir()
    with pytest.raises(HostError, match="in the way"):
        comfy_host.link_pack(tmp_path)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "folder" / "a.json"
    comfy_host.write_atomically(path, b"one")
    comfy_host.write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_torch_is_pinned_here_and_never_in_the_packs_requirements():
    pins = comfy_host.ENVIRONMENT.read_text()
    assert {"torch", "torchvision", "torchaudio"} <= {line.partition("==")[0] for line in pins.splitlines()}
    for line in (comfy_host.REPO / "requirements.txt").read_text().splitlines():
        assert not line.startswith(("torch", "xformers"))


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("quickstart.py", ["--image", "absent.png"]),
        ("queue_edit.py", ["--image", "absent.png", "--prompt", "x"]),
    ],
)
def test_an_error_is_one_sentence_on_stderr_and_status_one(script, arguments):
    command = [sys.executable, comfy_host.SCRIPTS / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Error: There is no picture" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_stamp_is_readable(tmp_path, pip_calls):
    requirement = tmp_path / "one.txt"
    requirement.write_text("a")
    comfy_host.install(Path(sys.executable), [requirement], tmp_path / "installed.json")
    assert json.loads((tmp_path / "installed.json").read_text()) == [comfy_host.hash_file(requirement)]
