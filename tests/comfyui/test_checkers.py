"""The community's own checkers: comfy-lint on the workflows in API format, comfy-test on what the browser loads."""

import json
import subprocess
import sys

from comfy_host import REPO

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
