"""Templates in other languages: locales/*/main.json has every title, group and note, under the names that the notes use."""

import json
import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
TEMPLATES = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((REPO / "workflows").glob("*.json"))}
TEXTS = json.loads((REPO / "locales" / "zh" / "main.json").read_text("utf-8"))["qwenEditFast"]["templates"]
EMPHASIS = re.compile(r"(?<!\*)\*([^*\n]+)\*(?!\*)")


def titles(template: dict) -> set[str]:
    return {one["title"] for one in [*template["nodes"], *template["groups"]] if "title" in one}


def test_every_title_and_note_has_a_translation_and_none_is_left_over():
    assert TEXTS["titles"].keys() == set().union(*map(titles, TEMPLATES.values()))
    assert TEXTS["notes"].keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_file_of_a_template_names_it_and_its_note_speaks_of_titles_that_are_there(name: str):
    template = TEMPLATES[name]
    assert template["extra"] == {"qwenEditTemplate": name}
    (note,) = [node["widgets_values"][0] for node in template["nodes"] if node["type"] == "MarkdownNote"]
    named = {TEXTS["titles"][word] for word in EMPHASIS.findall(note) if word in titles(template)}
    assert named <= set(EMPHASIS.findall(TEXTS["notes"][name]))
