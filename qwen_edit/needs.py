"""Imports that fail, explained: a package that is not installed or too old, or a host of another version.

It imports nothing but the standard library, because it runs where other imports fail.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import VERSION

COMFYUI = "0.30"
PACK = Path(__file__).resolve().parents[1]


def requirements() -> list[str]:
    """The packages that ``requirements.txt`` names."""
    lines = (PACK / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [found[0] for line in lines if (found := re.match(r"[A-Za-z0-9_.-]+", line))]


@contextmanager
def explained_imports() -> Iterator[None]:
    """Around imports that bring other packages and ComfyUI's own modules.

    Raises:
        ImportError: one of them failed; the message says what to install or which version is needed.
    """
    try:
        yield
    except (ImportError, AttributeError) as e:
        raise ImportError(_explanation(e)) from e
    except RuntimeError as e:  # what diffusers makes of an ImportError in a part that it imports late
        if not isinstance(e.__cause__, ImportError):
            raise
        raise ImportError(_explanation(e.__cause__)) from e


def _explanation(error: ImportError | AttributeError) -> str:
    package = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if package in requirements():
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        problem = (
            f"The package {package} is not installed" if missing else f"The package {package} does not fit ({error})"
        )
        return (
            f"{VERSION} {problem}. Install what this pack needs with ComfyUI's Python: python -m pip install -r"
            f" custom_nodes/{PACK.name}/requirements.txt; then restart ComfyUI."
        )
    host = sys.modules.get("comfyui_version")
    version = "of an unknown version" if host is None else host.__version__
    return (
        f"{VERSION} Qwen Edit Fast needs ComfyUI {COMFYUI}, or a newer one that still has what it uses; this is ComfyUI"
        f" {version}, and {error}. If it is older, update ComfyUI; if it is newer, update Qwen Edit Fast."
    )
