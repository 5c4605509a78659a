"""Without a card the Triton kernels run in Triton's interpreter, chosen when triton and the kernels are imported.

That has to be before any other test imports triton (comfy-kitchen does). The variable is not left behind: servers that
tests start inherit the environment.
"""

import contextlib

import pytest
import torch

INTERPRETER = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}

with pytest.MonkeyPatch.context() as environment, contextlib.suppress(ImportError):
    for name, value in INTERPRETER.items():
        environment.setenv(name, value)
    import qwen_edit.kernels.fused
    import qwen_edit.kernels.int8_matmul
    import qwen_edit.kernels.unpack  # noqa: F401


@pytest.fixture
def interpreter(monkeypatch):
    """For tests that launch Triton kernels: the interpreter looks at the variable again when it runs."""
    for name, value in INTERPRETER.items():
        monkeypatch.setenv(name, value)
