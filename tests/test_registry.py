"""What the registry reads: one version everywhere, and what stays out of the package is there to be left out."""

import re
import tomllib
from pathlib import Path

REPO = Path(__file__).parents[1]


def test_the_version_is_the_one_at_the_top_of_the_change_log():
    project = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
    versions = re.findall(r"^## (\S+)$", (REPO / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert project["version"] == versions[0]
    assert versions == sorted(versions, key=lambda one: [int(part) for part in one.split(".")], reverse=True)


def test_what_the_package_leaves_out_is_there():
    lines = (REPO / ".comfyignore").read_text("utf-8").splitlines()
    for line in lines:
        assert line.startswith("#") or (REPO / line).is_dir(), line
