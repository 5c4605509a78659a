"""Translations and help pages keep in step with the nodes."""

import json
import re

import pytest
from array_client import ArrayClient
from comfy_host import REPO
from make_locales import LOCALES, english, keys

pytestmark = pytest.mark.server


def texts(language: str) -> dict:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text("utf-8"))


def test_english_texts_are_those_of_the_nodes(client: ArrayClient):
    assert texts("en") == english(client.get("/object_info")), "scripts/make_locales.py refreshes them."


def test_chinese_texts_are_complete(client: ArrayClient):
    assert set(keys(texts("zh"))) == set(keys(english(client.get("/object_info"))))


def test_every_input_has_a_tooltip():
    for name, node in texts("en").items():
        # the page has its own text for the seed's habit
        bare = [
            key for key, entry in node["inputs"].items() if "tooltip" not in entry and key != "control_after_generate"
        ]
        assert not bare, f"{name}: {bare}"


def test_server_hands_out_the_texts(client: ArrayClient):
    served = client.get("/i18n")
    for language in ("en", "zh"):
        assert served[language]["nodeDefs"] == texts(language)
        assert "Qwen Edit Fast" in served[language]["nodeCategories"]


@pytest.mark.parametrize("name", texts("en"))
def test_every_node_has_help_in_both_languages(name: str):
    docs = REPO / "web" / "docs"
    for page in (docs / f"{name}.md", docs / name / "zh.md"):
        text = page.read_text("utf-8")
        assert text.startswith("# ")
        pictures = re.findall(r"!\[.+\]\((.+)\)", text)
        assert pictures, f"{page} has no example picture"
        assert all((docs / picture).is_file() for picture in pictures)
        assert re.search("^## (Rules and pitfalls|Pitfalls|.*注意.*)$", text, re.MULTILINE), f"{page} names no pitfalls"
        # the names in the first cells of its tables: "prompt", "width, height", "lora_1 … lora_4 (advanced)"
        cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
        rows = {word.rstrip("0123456789").rstrip("_") for cell in cells for word in re.findall(r"\w+", cell)}
        for key in texts("en")[name]["inputs"]:
            # picture_1, lora_1 … stand for the others of their kind
            kind = key.removeprefix("pictures_").rstrip("0123456789").rstrip("_")
            if key not in ("control_after_generate", "pictures"):
                assert kind in rows, f"{page} has no row for the input {key}"
