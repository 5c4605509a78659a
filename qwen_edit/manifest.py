"""A batch's items: read from a CSV or JSONL manifest or from a folder's file names, named, and told apart by digests.

Only the standard library is needed, so that scripts without torch plan the same items, and the same names of results, as
the node that makes them. What a run has done is told by which results exist: a result's name carries the digest of
everything that decides the picture, so a changed prompt, picture or model is another result.

One line is one edit. Columns: ``picture`` (or ``picture_1`` ... ``picture_10``; in JSONL also a list under ``pictures``),
``prompt``, ``negative``, ``seed``, ``width``, ``height`` and ``name`` (of the result); what is left out or empty is the
node's.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from .errors import INPUT

MANIFEST_SUFFIXES = (".csv", ".jsonl")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_BYTES = 64 * 2**20  # of a manifest: some 100,000 items with long prompts
MAX_PICTURES = 10
MAX_PROMPT_CHARACTERS = 8000  # what a prompt is cut to in a single edit (text_encoder); here the item is refused
MAX_SEED = 2**64 - 1
GRID, MAX_SIDE = 16, 8192  # pixels
MAX_NAME = 80  # characters
DIGEST_DIGITS = 12
# Inputs of QwenEditBatch that are each item's own, or change nothing in a picture.
NOT_IDENTITY = ("source", "prompt", "negative", "seed", "width", "height", "output", "wave", "together")
TEMPORARY_PREFIX, TEMPORARY_SUFFIX = ".qwen_edit_", ".tmp"

PICTURE_COLUMNS = ("picture", *(f"picture_{number}" for number in range(1, MAX_PICTURES + 1)))
TEXTS = ("prompt", "negative")
NUMBERS = {"seed": MAX_SEED, "width": MAX_SIDE, "height": MAX_SIDE}
COLUMNS = (*PICTURE_COLUMNS, *TEXTS, *NUMBERS, "name")


@dataclass(frozen=True)
class Defaults:
    """What an item has that says nothing about it: the node's widgets."""

    prompt: str = ""
    negative: str = " "
    seed: int = 0
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Item(Defaults):
    """One edit. ``pictures`` are paths relative to the manifest's folder.

    ``line`` is where it stands in the manifest, from 1; 0 for a picture of a folder, which has no lines.
    """

    line: int = 0
    pictures: tuple[str, ...] = ()
    name: str = ""

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"line {self.line} ({self.name})" if self.line else ", ".join(self.pictures)

    def decides(self) -> list[Any]:
        """What the picture depends on besides the contents of its pictures."""
        return [getattr(self, field.name) for field in fields(Defaults)]


@dataclass(frozen=True)
class Refused:
    """A line that can't be an edit, and why; ``name`` is what is known of it."""

    line: int
    name: str
    reason: str


def read_manifest(path: Path, defaults: Defaults) -> list[Item | Refused]:
    """The items of a manifest, in its order; a bad line is refused without harm to the others.

    Raises:
        ValueError: the file as a whole can't be read; the message names line and column and what to do.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(
            f"{INPUT} {path.name} has {size / 2**20:.0f} MiB; a manifest may have {MAX_BYTES >> 20}. Split it into several."
        )
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{INPUT} {path.name}, line {line}: no valid UTF-8. Save the manifest as UTF-8.") from None
    read = {".csv": _csv_rows, ".jsonl": _jsonl_rows}.get(path.suffix.lower())
    if read is None:
        raise ValueError(
            f"{INPUT} {path.name} is no manifest. Its name should end in {' or '.join(MANIFEST_SUFFIXES)}."
        )
    items = [_item(line, row, defaults) for line, row in read(text, path.name)]
    if not items:
        raise ValueError(f"{INPUT} {path.name} has no items. Write one edit on each line.")
    return items


def items_of_pictures(names: Iterable[str], defaults: Defaults) -> list[Item | Refused]:
    """One item for each picture of a folder, with the same values for all."""
    return [_item(0, {"picture": name}, defaults) for name in names]


def is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")


def _csv_rows(text: str, file: str) -> Iterable[tuple[int, Mapping[str, Any] | str]]:
    """(line, values by column) for each record, or (line, what is wrong with it)."""
    # strict: a quote that is never closed is an error, and not one field that holds the rest of the file
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
    except csv.Error as error:
        raise ValueError(f"{INPUT} {file}, line 1: {error}.") from None
    _check_header(header, file)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"this is no valid CSV: {error}. Double the quotes inside of a quoted text."
            continue
        if not any(cell.strip() for cell in record):
            continue
        if len(record) > len(header):
            yield line, f"{len(record)} values for {len(header)} columns. Put texts with a comma into quotes."
            continue
        yield line, dict(zip(header, record, strict=False))


def _check_header(header: Sequence[str], file: str) -> None:
    wrong = [name for name in header if name not in COLUMNS]
    if wrong or not any(name in PICTURE_COLUMNS for name in header):
        what = f"there is no column {wrong[0]!r}" if wrong else "the column 'picture' is missing"
        raise ValueError(
            f"{INPUT} {file}, line 1: {what}. The first line names the columns: picture (or picture_1, picture_2 ...),"
            " prompt, negative, seed, width, height, name; all but the picture may be left out."
        )
    double = next((name for name in header if header.count(name) > 1), None)
    if double is not None:
        raise ValueError(f"{INPUT} {file}, line 1: the column {double!r} is there twice. Remove one.")


def _jsonl_rows(text: str, file: str) -> Iterable[tuple[int, Mapping[str, Any] | str]]:
    del file
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            yield line, f"column {error.colno}: this is no valid JSON: {error.msg}. Write one object on each line."
            continue
        except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
            yield line, f"this is no valid JSON: {error}."
            continue
        if not isinstance(row, dict):
            yield line, 'this is no object. Write one on each line, such as {"picture": "a.png", "seed": 1}.'
            continue
        unknown = next((key for key in row if key not in (*COLUMNS, "pictures")), None)
        if unknown is not None:
            yield line, f"there is no column {unknown!r}. Known are pictures, {', '.join(COLUMNS[:2])} ..., {_OTHERS}."
            continue
        yield line, row


_OTHERS = ", ".join((*TEXTS, *NUMBERS, "name"))


class _Bad(Exception):
    """One value of a line, and what is wrong with it."""


def _item(line: int, row: Mapping[str, Any] | str, defaults: Defaults) -> Item | Refused:
    if isinstance(row, str):
        return Refused(line, "", f"{INPUT} line {line}: {row}")
    pictures: tuple[str, ...] = ()
    try:
        pictures = _pictures(row)
        values: dict[str, Any] = {key: _text(row, key) for key in TEXTS if _given(row, key)}
        values |= {key: _number(row, key) for key in NUMBERS if _given(row, key)}
        known = replace(defaults, **values)
        if not known.prompt.strip():
            raise _Bad("column prompt: it is empty, and there is no prompt for all items. Write what to change.")
        for key in TEXTS:
            _check_length(key, getattr(known, key))
        own = _text(row, "name") if _given(row, "name") else PurePosixPath(pictures[0].replace("\\", "/")).stem
        return Item(**vars(known), line=line, pictures=pictures, name=safe_name(own))
    except _Bad as error:
        where = f"line {line}" if line else row["picture"]
        return Refused(line, pictures[0] if pictures else "", f"{INPUT} {where}, {error}")


def _given(row: Mapping[str, Any], key: str) -> bool:
    """Whether a value is there; an empty cell of a table is none, an empty negative prompt is a space."""
    value = row.get(key)
    return value is not None and not (isinstance(value, str) and not value.strip())


def _pictures(row: Mapping[str, Any]) -> tuple[str, ...]:
    listed = row.get("pictures")
    if listed is None:
        found = [_text(row, key) for key in PICTURE_COLUMNS if _given(row, key)]
    elif isinstance(listed, list) and not any(_given(row, key) for key in PICTURE_COLUMNS):
        found = [_text({"pictures": one}, "pictures") for one in listed]
    else:
        raise _Bad("column pictures: expected a list of names, and no other column with pictures.")
    if not 1 <= len(found) <= MAX_PICTURES:
        raise _Bad(f"column picture: {len(found)} pictures; an edit has 1 to {MAX_PICTURES}.")
    return tuple(name.strip() for name in found)


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise _Bad(f"column {key}: got {value!r:.80}, expected a text.")
    return value


def _number(row: Mapping[str, Any], key: str) -> int:
    value = row[key]
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,20}\s*", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= NUMBERS[key]:
        raise _Bad(f"column {key}: got {value!r:.80}, expected a whole number from 0 to {NUMBERS[key]}.")
    if key != "seed" and value % GRID:
        raise _Bad(f"column {key}: got {value}, expected 0 (as the picture) or a multiple of {GRID}.")
    return value


def _check_length(key: str, text: str) -> None:
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise _Bad(
            f"column {key}: {len(text):,} characters; at most {MAX_PROMPT_CHARACTERS:,} can be used. Shorten it."
        )


def safe_name(text: str) -> str:
    """A text as a part of a file's name on any system, never empty."""
    plain = re.sub(r"[^\w.() -]+", "_", text).strip(" .")
    # in bytes, since file systems count those
    return plain[:MAX_NAME].encode("utf-8", "ignore")[:160].decode("utf-8", "ignore").strip(" .") or "edit"


def contained(root: Path, name: str, base: Path | None = None, must_exist: bool = True) -> Path:
    """The file or folder ``name``, relative to ``base`` (a folder in ``root``, default: ``root``), with links resolved.

    Raises:
        ValueError: it lies outside of ``root``, also by ``..`` or a symbolic link, or is not there. The message holds the
            name and no path of this machine.
    """
    root = root.resolve()
    refused = (
        f"{INPUT} {name!r:.200} is not inside ComfyUI's folder {root.name!r}. Put it there and write its name only."
    )
    if "\0" in name or PurePath(name).is_absolute() or re.match(r"[A-Za-z]:|[\\/]", name):
        raise ValueError(refused)
    try:
        path = (base or root).joinpath(name).resolve()
        inside, exists = path.is_relative_to(root), path.exists()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # a name that is too long, or half of a surrogate pair, or a ring of links
        raise ValueError(refused) from None
    if not inside:
        raise ValueError(refused)
    if must_exist and not exists:
        raise ValueError(f"{INPUT} There is no {name!r:.200} in ComfyUI's folder {root.name!r}.")
    return path


def digest(item: Item, picture_hashes: Sequence[str], settings: str) -> str:
    """What tells this item's result from any other: hexadecimal digits.

    Args:
        picture_hashes: SHA-256 of the contents of its pictures.
        settings: see ``settings_of``.
    """
    parts = json.dumps([item.decides(), list(picture_hashes), settings])
    return hashlib.sha256(parts.encode()).hexdigest()[:DIGEST_DIGITS]


def result_name(item: Item, digest: str) -> str:
    """The file of an item's result; it begins as its source does."""
    return f"{item.name}_{digest}.png"


def temporary_path(result: Path) -> Path:
    """Where a result is written before it gets its name. The next run over the folder removes what is left of it."""
    return result.with_name(f"{TEMPORARY_PREFIX}{result.stem[-DIGEST_DIGITS:]}{TEMPORARY_SUFFIX}")


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted runs left in a folder of results."""
    for left in folder.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}"):
        if left.is_file():
            left.unlink()


def hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def settings_of(node_of: Callable[[str], Mapping[str, Any]], node_id: str, leave_out: Iterable[str]) -> str:
    """A graph's node and everything before it, in a form that equal graphs share whatever their nodes' ids and titles.

    Args:
        node_of: a node of the graph in ComfyUI's API format, by id.
        leave_out: inputs of the node itself that do not decide the picture.
    """
    numbers: dict[str, int] = {}
    described: list[Any] = []

    def visit(node_id: str, ignored: frozenset[str]) -> int:
        if node_id not in numbers:
            numbers[node_id] = place = len(described)
            described.append(None)
            node = node_of(node_id)
            inputs = {
                name: {"from": visit(value[0], frozenset()), "output": value[1]} if _is_link(value) else _as_one(value)
                for name, value in sorted(node["inputs"].items())
                if name not in ignored
            }
            described[place] = [node["class_type"], inputs]
        return numbers[node_id]

    visit(node_id, frozenset(leave_out))
    return json.dumps(described, sort_keys=True)


def _as_one(value: Any) -> Any:
    """1.0 as 1: browsers write it so, and ComfyUI makes it 1.0 again before a node sees it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_link(value: Any) -> bool:
    """ComfyUI's own rule (comfy_execution/graph_utils.py)."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) in (int, float)
