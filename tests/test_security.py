"""What no module of the pack may do, read off its source; and that SECURITY.md and the requirements say what is true."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
MODULES = [REPO / "__init__.py", *sorted((REPO / "nodes").rglob("*.py")), *sorted((REPO / "qwen_edit").rglob("*.py"))]

# Code, processes, network, installs. aiohttp is ComfyUI's server, which routes answer through.
FORBIDDEN_IMPORTS = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code", "codeop", "runpy",
    "subprocess", "multiprocessing", "pty", "ctypes", "cffi", "socket", "ssl", "http", "urllib", "urllib3", "ftplib",
    "smtplib", "telnetlib", "xmlrpc", "requests", "httpx", "websockets", "huggingface_hub", "pip", "ensurepip", "webbrowser",
}  # fmt: skip
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
FORBIDDEN_CALLS = {
    "os.system", "os.popen", "os.fork", "os.startfile", "os.putenv", "os.symlink", "os.link", "os.remove",
    "os.unlink", "shutil.rmtree", "torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.package",
    "numpy.load", "np.load", "np.fromfile", "aiohttp.ClientSession", "aiohttp.request", "sys.path.insert", "sys.path.append",
}  # fmt: skip
WRITING = {
    "write_text",
    "write_bytes",
    "mkdir",
    "makedirs",
    "unlink",
    "rename",
    "rmdir",
    "touch",
    "symlink_to",
    "hardlink_to",
}
# Where files are written or folders made, and what for.
WRITERS = {
    "qwen_edit/perf/log.py": "the performance log and its exports, in ComfyUI's output folder",
    "nodes/host/batch_files.py": "a batch's results, in ComfyUI's output folder",
    "qwen_edit/manifest.py": "takes away what a stopped batch has left half-written there",
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def opens_for_writing(call: ast.Call) -> bool:
    modes = [a.value for a in [*call.args, *(k.value for k in call.keywords)] if isinstance(a, ast.Constant)]
    return any(isinstance(mode, str) and re.fullmatch(r"[rbt]*[wax+][wrbtax+]*", mode) for mode in modes)


def problems(source: str, name: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            outside = not (isinstance(node, ast.ImportFrom) and node.level)
            found += [f"imports {m}" for m in modules if outside and m.partition(".")[0] in FORBIDDEN_IMPORTS]
            if isinstance(node, ast.ImportFrom) and outside:
                called = [f"{node.module}.{a.name}" for a in node.names]
                found += [f"imports {c}" for c in called if c in FORBIDDEN_CALLS]
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(f"names {node.id}")
        elif isinstance(node, ast.Attribute) and dotted(node) in FORBIDDEN_CALLS:
            found.append(f"names {dotted(node)}")
        elif isinstance(node, ast.Call):
            called, method = dotted(node.func), getattr(node.func, "attr", "")
            keywords = {k.arg: k.value for k in node.keywords}
            if re.match(r"os\.(exec|spawn|posix_spawn)", called):
                found.append(f"calls {called}")
            if method == "from_pretrained":
                local = keywords.get("local_files_only")
                if not (isinstance(local, ast.Constant) and local.value is True):
                    found.append("calls from_pretrained without local_files_only=True")
            if called.endswith("import_module") and not all(isinstance(a, ast.Constant) for a in node.args):
                found.append("imports a module by a name that is computed")
            if any(k in keywords for k in ("trust_remote_code", "shell", "weights_only")):
                found.append(f"passes {', '.join(filter(None, keywords))}")
            writes = method in WRITING or called in (
                "os.open",
                "os.chmod",
                "os.replace",
                "os.write",
                "os.ftruncate",
                "save_file",
            )
            if (writes or ("open" in (method, called) and opens_for_writing(node))) and name not in WRITERS:
                found.append(f"writes files ({called or method})")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(REPO).as_posix())
def test_no_pickle_eval_shell_network_install_or_unknown_writer(path):
    assert problems(path.read_text(encoding="utf-8"), path.relative_to(REPO).as_posix()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import urllib.request", "from torch import load", "torch.load(p)", "eval(x)",
        "f = exec", "os.system('x')", "os.execv('x', [])", "import subprocess as s", "Model.from_pretrained(p)",
        "Model.from_pretrained(p, local_files_only=False)", "importlib.import_module(name)", "open(p, 'wb')", "p.open(mode='a')",
        "p.write_text('x')", "from os import system", "x(trust_remote_code=True)", "np.load(p)", "os.replace(a, b)",
    ],
)  # fmt: skip
def test_the_check_sees(line):
    assert problems(line, "qwen_edit/other.py"), line


def test_modules_that_write_still_do():
    assert all((REPO / name).is_file() and re.search(r"os\.|unlink", (REPO / name).read_text()) for name in WRITERS)


# SECURITY.md


def security() -> str:
    return (REPO / "SECURITY.md").read_text(encoding="utf-8")


def named_tests() -> list[tuple[str, str]]:
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", security())


def test_every_line_of_the_threat_model_names_tests_that_exist():
    start, end = security().index("## Threats"), security().index("## What is not")
    _, _, *rows = [line for line in security()[start:end].splitlines() if line.startswith("| ")]
    assert len(rows) >= 10
    assert not [row for row in rows if "`tests/" not in row]
    for file, name in named_tests():
        tree = ast.parse((REPO / file).read_text(encoding="utf-8"))
        assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, f"{file}::{name}"


def names_in(text: str) -> set[str]:
    return {re.match(r"[\w.-]+", line)[0].lower() for line in text.splitlines() if re.match(r"\w", line)}


def test_the_list_of_dependencies_is_that_of_the_requirements():
    wanted = names_in((REPO / "requirements.txt").read_text())
    listed = set(re.findall(r"^\| `([\w.-]+)` \|", security(), re.MULTILINE))
    assert listed == wanted
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert names_in("\n".join(project["dependencies"])) == wanted
    assert not wanted & {"torch", "torchvision", "torchaudio", "xformers"}


def test_modules_import_only_what_is_listed():
    """Packages that are imported are in the requirements, ComfyUI's own, torch, the standard library, or probed for."""
    probed = {"triton", "comfy_kitchen", "flash_attn", "flash_attn_interface", "sageattention", "xformers", "pynvml"}
    host = {
        "comfy", "comfy_aimdo", "comfy_api", "comfy_execution", "comfy_extras", "comfyui_version", "folder_paths", "latent_preview", "node_helpers",
        "nodes", "server", "aiohttp", "transformers", "torch", "spandrel", "kornia",
    }  # fmt: skip
    listed = {"pil" if name == "pillow" else name for name in names_in((REPO / "requirements.txt").read_text())}
    imported = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").partition(".")[0])
            elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module"):
                imported |= {a.value.partition(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    assert "kornia" in imported
    unknown = {n for n in imported if n.lower() not in listed} - host - probed - set(sys.stdlib_module_names)
    assert not unknown
