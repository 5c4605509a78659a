"""Reports in the language of the page: the templates in locales/*/main.json are what the code writes."""

import ast
import json
import re
from pathlib import Path
from string import Formatter

import pytest

REPO = Path(__file__).parents[1]
SENTENCES = {
    language: json.loads((REPO / "locales" / language / "main.json").read_text("utf-8"))["qwenEditFast"]["sentences"]
    for language in ("en", "zh")
}
BLANK = "{}"


def blanks(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name}


def without_names(template: str) -> str:
    return re.sub(r"\{\w+\}", BLANK, template)


def written(node: ast.AST) -> str | None:
    """A literal with its expressions as blanks; None: it is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else BLANK for part in node.values)
    return None


def literals() -> set[str]:
    files = [*(REPO / "nodes").rglob("*.py"), *(REPO / "qwen_edit").rglob("*.py")]
    trees = [ast.parse(file.read_text("utf-8")) for file in files]
    return {text for tree in trees for node in ast.walk(tree) if (text := written(node))}


def test_both_languages_have_the_same_sentences_and_blanks():
    assert SENTENCES["en"].keys() == SENTENCES["zh"].keys()
    for name, own in SENTENCES["zh"].items():
        assert blanks(own) <= blanks(SENTENCES["en"][name]), name


def test_every_english_sentence_is_written_by_the_code():
    everything = "\n".join(literals())
    for name, english in SENTENCES["en"].items():
        # lines are put together: what precedes or follows such a part is a blank of the template
        words = without_names(english).removeprefix(BLANK).removesuffix(BLANK).removesuffix(BLANK + ".")
        assert words in everything, name


@pytest.mark.parametrize("call", ["Finding", "say"])
def test_what_nodes_warn_of_and_say_while_they_run_has_a_sentence(call: str):
    known = {without_names(english) for english in SENTENCES["en"].values()}
    at = {"Finding": 2, "say": 0}[call]
    found = 0
    for file in [*(REPO / "nodes").rglob("*.py"), *(REPO / "qwen_edit").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or len(node.args) <= at:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name == call and (text := written(node.args[at])) is not None:
                found += 1
                assert text in known, f"{file.name}: {text}"
    assert found > 3
