"""The community's own checkers: comfy-lint on the workflows in API format, comfy-test on what the browser loads,
comfy-import-guard on what the pack imports from ComfyUI and how it calls it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_host import REPO, Host

FILES = ("LoadImage", "UNETLoader", "CLIPLoader", "VAELoader")  # name files that this server does not have


def is_known(found: dict) -> bool:
    """Files that are not here; and what comfy-lint 0.1.0 does not know of ComfyUI: growing inputs (it misses ``pictures`` and
    wonders at ``pictures.picture_1``), and outputs of the type of an input."""
    if found["rule"] == "invalid-enum":
        return found["class_type"] in FILES
    growing = found["rule"] == "missing-required" and "COMFY_AUTOGROW_V3" in found["message"]
    matched = found["rule"] == "type-mismatch" and "COMFY_MATCHTYPE_V3" in found["message"]
    return growing or matched or (found["rule"] == "extraneous-input" and "." in found["field"])


def test_comfy_lint_finds_nothing_in_the_workflows(client, tmp_path):
    schema, broken = tmp_path / "object_info.json", tmp_path / "broken.json"
    schema.write_text(json.dumps(client.get("/object_info")), encoding="utf-8")
    workflows = sorted((REPO / "workflows" / "api").glob("*.json"))
    graph = json.loads(workflows[0].read_text(encoding="utf-8"))
    graph["1"]["inputs"]["profile"] = "fastest"  # so that the checker has something to find
    broken.write_text(json.dumps(graph), encoding="utf-8")
    command = [sys.executable, "-c", "from comfy_lint.cli import main; main()", "--json", "--schema-cache", str(schema)]
    checked = subprocess.run([*command, *map(str, [*workflows, broken])], capture_output=True, text=True, check=False)
    files = json.loads(checked.stdout)["files"]
    assert len(files) == len(workflows) + 1
    found = [(file["path"], d["rule"], d["message"]) for file in files for d in file["diagnostics"] if not is_known(d)]
    assert [(path, rule) for path, rule, _ in found] == [(str(broken), "invalid-enum")], found


def test_comfy_test_finds_nothing_in_the_extension():
    """Its other static check refuses Python files that Windows' old code page can't hold, as any with Chinese words."""
    command = [
        sys.executable,
        "-c",
        "import sys; from comfy_test.cli import main; sys.exit(main())",
        "lint",
        "--check",
        "javascript",
        str(REPO),
    ]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "0 error(s), 0 warning(s)" in checked.stdout + checked.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="comfy-import-guard reads ComfyUI from a git repository")
def test_comfy_import_guard_finds_all_that_the_pack_uses_of_comfyui(host: Host, tmp_path: Path):
    clone, packs = tmp_path / "cache" / "ComfyUI", tmp_path / "custom_nodes"
    for source in host.comfyui.glob("comfy*/"):
        shutil.copytree(source, clone / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    for words in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "t"],
    ):
        subprocess.run(["git", *words], cwd=clone, check=True)
    for name in ("pack", "broken"):
        for folder in ("nodes", "qwen_edit"):
            shutil.copytree(REPO / folder, packs / name / folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPO / "__init__.py", packs / name)
    (packs / "broken" / "more.py").write_text("from comfy.model_management import fly\n")  # something to find
    command = [
        sys.executable,
        "-c",
        "from comfy_import_guard.cli import main; main()",
        "--offline",
        "--quiet",
        "--json",
    ]
    command += ["--cache-dir", str(clone.parent), "check", "--comfy-dir", str(tmp_path), "--target", "HEAD"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {one["pack"]: one for one in json.loads(checked.stdout)["packs"]}
    assert found["pack"]["verdict"] == "SAFE", found["pack"]
    assert found["pack"]["references"] > 50
    assert [one["symbol"] for one in found["broken"]["breaking"]] == ["fly"]
