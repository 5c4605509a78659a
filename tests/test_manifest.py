"""Manifests: what a line may say, what is refused and how it is named, digests, and names that stay inside a folder."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_fuzzing import anything, fuzz, outcome

from qwen_edit import manifest, text_encoder
from qwen_edit.manifest import Defaults, Item, Refused, contained, digest, read_manifest, safe_name, settings_of

DEFAULTS = Defaults(prompt="make it grey", seed=4, width=64)


def utf8(text: str) -> bytes:
    """UTF-8, also of halves of surrogate pairs, which is then none."""
    return text.encode("utf-8", "surrogatepass")


def read(tmp_path: Path, text: str | bytes, suffix: str = ".csv") -> list:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_manifest(path, DEFAULTS)


def test_a_table_gives_items_and_defaults(tmp_path):
    items = read(
        tmp_path,
        "\ufeffPicture, prompt,seed,width,height,negative,name\n"
        'a.png,"one, two\nthree",18446744073709551615,32,48,bad,first\n'
        "\n"
        "sub/b c.jpg,,,,,,\n",
    )
    assert items == [
        Item("one, two\nthree", "bad", 2**64 - 1, 32, 48, line=2, pictures=("a.png",), name="first"),
        Item("make it grey", " ", 4, 64, 0, line=5, pictures=("sub/b c.jpg",), name="b c"),
    ]


def test_json_lines_give_the_same(tmp_path):
    rows = [{"pictures": ["a.png", "b.png"], "seed": 5}, {"picture_1": "c.png", "picture_2": "d.png", "prompt": "x"}]
    items = read(tmp_path, "\n\n".join(map(json.dumps, rows)), ".jsonl")
    assert [(item.pictures, item.seed, item.prompt, item.line) for item in items] == [
        (("a.png", "b.png"), 5, "make it grey", 1),
        (("c.png", "d.png"), 4, "x", 3),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a.png,x,1.5", "column seed: got '1.5'"),
        ("a.png,x,-1", "column seed: got '-1'"),
        ("a.png,x,18446744073709551616", "column seed: got"),
        ("a.png,x,١", "column seed: got"),  # a digit to Python, but no number that anyone typed
        (",x,1", "column picture: 0 pictures"),
        ("a.png,x,1,2", "4 values for 3 columns"),
        (f"a.png,{'x' * 8001},1", "column prompt: 8,001 characters"),
        ('a.png,"x"y,1', "no valid CSV"),
    ],
)
def test_a_bad_row_is_named_and_harms_no_other(tmp_path, line, said):
    bad, good = read(tmp_path, f"picture,prompt,seed\n{line}\nb.png,y,2\n")
    assert isinstance(bad, Refused)
    assert bad.line == 2
    assert said in bad.reason
    assert bad.reason.startswith("[QE_INPUT] line 2")
    assert (good.pictures, good.line) == (("b.png",), 3)


def test_an_item_without_any_prompt_is_refused(tmp_path):
    (tmp_path / "m.csv").write_text("picture,prompt\na.png, \nb.png,mirror it\n")
    bad, good = read_manifest(tmp_path / "m.csv", Defaults())
    assert bad.reason.startswith("[QE_INPUT] line 2, column prompt: it is empty")
    assert good.prompt == "mirror it"


def test_a_quote_that_is_never_closed_is_an_error_and_no_prompt(tmp_path):
    good, bad = read(tmp_path, 'picture,prompt\na.png,x\nb.png,"open\nc.png,y\n')
    assert good.pictures == ("a.png",)
    assert "no valid CSV" in bad.reason
    assert bad.line == 3


@pytest.mark.parametrize(
    "line",
    [
        "[1]", "{", '{"picture": 1}', '{"pictures": "a.png"}', '{"pictures": []}', '{"pictures": ["a", "b"], "picture": "c"}',
        '{"picture": "a", "width": 17}', '{"picture": "a", "width": true}', '{"picture": "a", "seed": 1.0}',
        '{"picture": "a", "seed": NaN}', '{"picture": "a", "size": 3}', '{"picture": "a", "prompt": ["x"]}', "[" * 100_000,
        '{"picture": "a", "seed": ' + "9" * 5000 + "}", json.dumps({"pictures": ["a"] * 11}),
    ],
)  # fmt: skip
def test_a_bad_object_is_refused(tmp_path, line):
    bad, good = read(tmp_path, line + '\n{"picture": "b.png"}', ".jsonl")
    assert isinstance(bad, Refused)
    assert bad.line == 1
    assert len(bad.reason) < 500
    assert good.pictures == ("b.png",)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("prompt\nx\n", "line 1: the column 'picture' is missing"),
        ("picture,prompts\na,x\n", "line 1: there is no column 'prompts'"),
        ("picture,seed,seed\na,1,2\n", "line 1: the column 'seed' is there twice"),
        ("", "line 1: the column 'picture' is missing"),
        ("picture\n", "has no items"),
        (b"picture\na\nb\xff\n", "line 3: no valid UTF-8"),
    ],
)
def test_a_manifest_that_is_wrong_as_a_whole(tmp_path, data, said):
    with pytest.raises(ValueError, match=r"^\[QE_INPUT\] m.csv") as caught:
        read(tmp_path, data)
    assert said in str(caught.value)


def test_limits_are_those_of_a_single_edit():
    assert manifest.MAX_PROMPT_CHARACTERS == text_encoder.MAX_PROMPT_CHARACTERS


def test_names_are_good_on_any_system():
    assert safe_name("a/b\\c:*?\n.") == "a_b_c_"
    assert safe_name("..") == "edit"
    assert safe_name("图片 (1)") == "图片 (1)"
    assert len(safe_name("图" * 300).encode()) <= 160


def test_names_stay_inside(tmp_path):
    root = tmp_path / "input"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.png").touch()
    (tmp_path / "secret.png").touch()
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "ring").symlink_to(root / "ring")
    assert contained(root, "sub/../sub/a.png") == root / "sub" / "a.png"
    assert contained(root, "a.png", root / "sub") == root / "sub" / "a.png"
    for name in (
        "../secret.png",
        "/etc/passwd",
        "link.png",
        "ring",
        "a\0",
        "C:\\x",
        "\\\\host\\x",
        "x" * 300,
        "\ud800",
        "no",
    ):
        with pytest.raises(ValueError, match=r"^\[QE_INPUT\]") as caught:
            contained(root, name)
        assert str(tmp_path) not in str(caught.value)
    assert contained(root, "new/folder", must_exist=False) == root / "new" / "folder"


def test_a_digest_tells_everything_that_decides_the_picture():
    item = Item("p", "n", 1, 64, 64, line=1, pictures=("a.png",), name="a")
    base = digest(item, ["h"], "s")
    assert base == digest(Item("p", "n", 1, 64, 64, line=9, pictures=("b.png",), name="b"), ["h"], "s")
    others = [
        digest(Item("q", "n", 1, 64, 64), ["h"], "s"),
        digest(Item("p", "m", 1, 64, 64), ["h"], "s"),
        digest(Item("p", "n", 2, 64, 64), ["h"], "s"),
        digest(Item("p", "n", 1, 96, 64), ["h"], "s"),
        digest(Item("p", "n", 1, 64, 96), ["h"], "s"),
        digest(item, ["i"], "s"),
        digest(item, ["h", "h"], "s"),
        digest(item, ["h"], "t"),
    ]
    assert len({base, *others}) == 9


def test_settings_are_of_the_graph_and_not_of_its_ids():
    def graph(loader: str, batch: str, **changes) -> str:
        nodes = {
            loader: {"class_type": "Loader", "inputs": {"model": "m", "precision": "bf16"}},
            "lora": {"class_type": "Lora", "inputs": {"model": [loader, 0], "strength": changes.get("strength", 1.0)}},
            batch: {"class_type": "Batch", "inputs": {"model": ["lora", 0], "clip": [loader, 1], "output": batch}},
            "other": {"class_type": "Other", "inputs": {"x": [batch, 0]}},
        }
        return settings_of(nodes.__getitem__, batch, ["output"])

    assert graph("1", "2") == graph("7", "8")
    assert graph("1", "2") != graph("1", "2", strength=0.5)


# Anything as a manifest: items, lines that are refused, or one sentence for the whole file

known = st.sampled_from(manifest.COLUMNS)
columns = known | st.sampled_from(["pictures", "Picture ", "x", "", "\ufeffpicture"])
cells = st.text(st.characters(), max_size=9) | st.sampled_from(
    ["a.png", "../a.png", "64", "0", "65", "-1", "1e3", "18446744073709551616", '"', '"a', "\0", "\r", "\n", ",", "x" * 8001]
)  # fmt: skip
tables = st.builds(
    lambda header, rows, end: (utf8(end.join(",".join(row) for row in [header, *rows])), ".csv"),
    st.lists(known, max_size=4, unique=True).map(lambda some: [*some[:-1], "picture"]) | st.lists(columns, max_size=5),
    st.lists(st.lists(cells, max_size=6), max_size=4),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
values = anything | cells | st.integers(-1, 9).map(lambda n: 16 * n) | st.lists(cells, max_size=12)
rows = st.dictionaries(known, values, max_size=3).map(lambda some: {"picture": "a.png"} | some)
lines = (rows | st.dictionaries(columns, values, max_size=5) | values).map(json.dumps) | cells
json_lines = st.lists(lines, max_size=4).map(lambda some: (utf8("\n".join(some)), ".jsonl"))
anyhow = st.tuples(st.binary(max_size=200) | st.text().map(utf8), st.sampled_from([".csv", ".jsonl"]))


@fuzz(300)
@given(tables | json_lines | anyhow)
@example((b'{"picture": ' + b"[" * 100_000, ".jsonl"))
@example((b'{"picture": "a.png", "seed": ' + b"9" * 5000 + b"}", ".jsonl"))
@example((b'{"picture": "\\ud800.png", "prompt": "\\udfff"}', ".jsonl"))
@example((b'{"picture": "a.png", "seed": NaN, "width": -0.0}', ".jsonl"))
@example((b'picture,prompt\na.png,"x\n', ".csv"))
@example((b"picture\n\0.png\n", ".csv"))
@example((b"picture\n" + b"x" * 200_000 + b"\n", ".csv"))
def test_anything_as_a_manifest(tmp_path, fuzzed):
    data, suffix = fuzzed
    path = tmp_path / f"fuzzed{suffix}"
    path.write_bytes(data)
    items, said = outcome(lambda: read_manifest(path, DEFAULTS), "[QE_INPUT]")
    if items is None:
        assert path.name in said
        return
    for item in items:
        if isinstance(item, Refused):
            assert item.reason.startswith(f"[QE_INPUT] line {item.line}")
            continue
        assert 1 <= len(item.pictures) <= manifest.MAX_PICTURES
        assert item.prompt.strip()
        assert 0 <= item.seed <= manifest.MAX_SEED
        assert all(0 <= side <= manifest.MAX_SIDE and side % manifest.GRID == 0 for side in (item.width, item.height))
        assert digest(item, ["0" * 64] * len(item.pictures), "{}")
        assert manifest.is_picture(manifest.result_name(item, "0" * 12))
        for name in item.pictures:
            path_of, _ = outcome(lambda name=name: contained(tmp_path, name), "[QE_INPUT]")
            assert path_of is None or path_of.is_relative_to(tmp_path.resolve())
        assert item.where
    assert [item.line for item in items] == sorted(item.line for item in items)
