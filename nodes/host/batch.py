"""Many edits in one run: what is read, edited and written at the same time, and what happens to those that fail.

Three threads share the work. One reads pictures and resizes them, a wave ahead; ComfyUI's prompt worker, the only one that
may ask for its memory manager, encodes a wave, samples and decodes it; one makes PNG files and writes them. Between them
wait at most a wave of pictures and ``UNWRITTEN`` results.

What exists in the output folder is the only state. A result appears there whole, under a name that tells what it was made
from, so a run that was stopped anywhere goes on by being started again. Only one server may write into a folder.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import latent_preview
import torch

import nodes

from ...qwen_edit.errors import INPUT, LORA, WEIGHTS
from ...qwen_edit.geometry import calculate_dimensions
from ...qwen_edit.manifest import Item, Refused, contained, digest, hash_bytes, is_picture, result_name
from ...qwen_edit.perf import stage
from ...qwen_edit.recipes import Recipe
from . import notes, sampling, status
from .batch_files import check_size, read_picture, write_png
from .encoding import Edit, Encoder, Pixels, leave_card

UNWRITTEN = 4  # results that may wait for the writing thread
MOST_TOGETHER = 4  # as measured: four of 512² in fp8 are made 2.2 times as fast as one by one; 1024² fills the card
FULL_AREA = 1024 * 1024
SHOWN = 8  # results on the node
LISTED = 200  # failed items in the report


@dataclass(frozen=True)
class Settings:
    """What is the same for all items."""

    recipe: Recipe
    reference_size: str
    megapixels: float  # area of results whose item names no size; 0: the picture's own
    wave: int  # items that are encoded before they are sampled
    together: int  # items in one forward; 0: by their area
    identity: str  # of model, recipe and everything else that decides a picture (``manifest.settings_of``)
    metadata: dict[str, Any]  # written into every PNG


@dataclass(frozen=True)
class Ready:
    """An item whose pictures are read."""

    item: Item
    digest: str
    edit: Edit
    sizes: tuple  # of result and references, (width, height) each
    pixels: Pixels


@dataclass(frozen=True)
class There:
    """An item whose result exists, or is being made because the same item stands further up."""

    item: Item
    result: str


@dataclass
class Tally:
    """How a run ended, or stands."""

    written: int = 0
    there: int = 0
    failed: list[Refused] = field(default_factory=list)
    latest: deque[str] = field(default_factory=lambda: deque(maxlen=SHOWN))  # results, by name

    def report(self, items: int) -> str:
        lines = [f"{items} items: {self.written} written, {self.there} already there, {len(self.failed)} failed."]
        lines += [bad.reason for bad in self.failed[:LISTED]]
        if len(self.failed) > LISTED:
            lines.append(f"... and {len(self.failed) - LISTED} more.")
        return "\n".join(lines)


class Batch:
    """One run over ``items``; ``run`` is called in the prompt worker's thread."""

    def __init__(self, model, clip, vae, settings: Settings, base: Path, folder: Path):
        """
        Args:
            base: the folder that the items' names start from.
            folder: where results go.
        """
        self.model, self.clip, self.vae = model, clip, vae
        self.settings, self.base, self.folder = settings, base, folder
        self.tally = Tally()
        self._input = Path(folder_paths.get_input_directory()).resolve()
        self._begun: set[str] = set()  # results of this run, for items that are there twice
        self._there: list[There] = []  # that are not counted yet
        self._encoder = Encoder(clip, vae)
        self._picture = lru_cache(maxsize=settings.wave)(read_picture)  # by one thread, so none is read twice
        self._reader = ThreadPoolExecutor(1, "qwen-edit-read")
        self._writer = ThreadPoolExecutor(1, "qwen-edit-write")
        self._unwritten: deque[tuple[Item, Future[str]]] = deque()
        self._done = 0

    def run(self, items: Sequence[Item | Refused]) -> Tally:
        """Make what is not there yet. Interrupting takes effect within one step, and keeps what is finished.

        Raises:
            OSError: results can't be written.
            ValueError: weights or LoRA can't be used, which no other item would change.
        """
        self._bar = comfy.utils.ProgressBar(len(items) * self.settings.recipe.steps)
        self._total = len(items)
        self._previewer = latent_preview.get_previewer(self.model.load_device, self.model.model.latent_format)
        try:
            for wave in self._waves(items):
                self._make(wave)
        finally:
            self._reader.shutdown(wait=False, cancel_futures=True)
            self._settle(0)
            self._writer.shutdown()
        self._count_those_there()
        for one in self._there:
            self._fail(_refused(one.item, ValueError(f"{INPUT} It failed further up, where it stands too."), "made"))
        return self.tally

    # Reading

    def _waves(self, items: Sequence[Item | Refused]) -> Iterator[list[Ready]]:
        """Items to be made, ``settings.wave`` at a time, while as many more are being read."""
        ahead: deque[Future] = deque()
        waiting = iter(items)
        wave: list[Ready] = []
        while True:
            while len(ahead) < self.settings.wave and (item := next(waiting, None)) is not None:
                ahead.append(self._reader.submit(self._read, item))
            if not ahead:
                break
            with stage("preprocess"):
                read = ahead.popleft().result()
            if isinstance(read, Ready):
                wave.append(read)
            elif isinstance(read, There):
                self._there.append(read)
            else:
                self._fail(read)
            self._count_those_there()
            comfy.model_management.throw_exception_if_processing_interrupted()
            if len(wave) == self.settings.wave:
                yield wave
                wave = []
        if wave:
            yield wave

    def _count_those_there(self) -> None:
        found = [one for one in self._there if (self.folder / one.result).exists()]
        for one in found:
            self._there.remove(one)
            self.tally.there += 1
            self._count("items_already_there")

    def _read(self, item: Item | Refused) -> Ready | There | Refused:
        """In the reading thread."""
        if isinstance(item, Refused):
            return item
        try:
            with torch.inference_mode():  # ComfyUI's own threads are in it, and it does not pass on to others
                paths = [contained(self._input, name, self.base) for name in item.pictures]
                for name, path in zip(item.pictures, paths, strict=True):
                    if not (path.is_file() and is_picture(path.name)):
                        raise ValueError(f"{INPUT} {name!r:.200} is no picture (PNG, JPEG, WebP, BMP or TIFF).")
                    check_size(name, path)
                hashes = [hash_bytes(path.read_bytes()) for path in paths]
                key = digest(item, hashes, self.settings.identity)
                name = result_name(item, key)
                if name in self._begun or (self.folder / name).exists():
                    return There(item, name)
                self._begun.add(name)
                names = [path.relative_to(self._input).as_posix() for path in paths]
                edit = self._edit(item, tuple(map(self._picture, names, hashes)))
                return Ready(item, key, edit, *Encoder.prepare(edit))
        except Exception as error:  # whatever a decoder says to a broken file is about this item only
            return _refused(item, error, "read")

    def _edit(self, item: Item, pictures: tuple[torch.Tensor, ...]) -> Edit:
        width, height = item.width, item.height
        if not (width or height) and self.settings.megapixels:
            own = pictures[0].shape[2] / pictures[0].shape[1]
            width, height = calculate_dimensions(round(self.settings.megapixels * FULL_AREA), own)
        return Edit(item.prompt, item.negative, pictures, width, height, self.settings.reference_size)

    # Editing

    def _make(self, wave: list[Ready]) -> None:
        encoded = []
        for ready in wave:
            try:
                with stage("preprocess"):
                    positive, negative, latent, said = self._encoder.encode(ready.edit, ready.pixels)
            except Exception as error:
                self._fail_or_raise(ready.item, error, "encoded")
                continue
            alike = (ready.sizes, sampling.joins(positive), sampling.joins(negative))
            encoded.append((alike, _Encoded(ready, positive, negative, latent, said)))
        leave_card(self.clip)
        for group in self._groups(encoded):
            self._sample(group)

    def _groups(self, encoded: list[tuple[tuple, "_Encoded"]]) -> Iterator[list["_Encoded"]]:
        """Those that fit into one forward, as many as are faster together, in the order of their first."""
        by_size: dict[tuple, list[_Encoded]] = {}
        for alike, one in encoded:
            by_size.setdefault(alike, []).append(one)
        for (sizes, *_), group in by_size.items():
            count = self.settings.together or self._best_count(*sizes[0])
            yield from (group[first : first + count] for first in range(0, len(group), count))

    def _best_count(self, width: int, height: int) -> int:
        if comfy.model_management.is_device_cpu(self.model.load_device):
            return 1
        return max(1, min(MOST_TOGETHER, FULL_AREA // (width * height)))

    def _sample(self, group: list["_Encoded"]) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        latent = group[0].latent | {"samples": torch.cat([one.latent["samples"] for one in group])}
        seeds = [one.ready.item.seed for one in group]
        positive, negative = (sampling.join([getattr(one, side) for one in group]) for side in ("positive", "negative"))
        try:
            with stage("denoise"):
                sampled = sampling.sample(
                    self.model, positive, negative, latent, self.settings.recipe, seeds, self._show_step(len(group))
                )
            decode = nodes.VAEDecode().decode
            with stage("decode"):
                pictures = [decode(self.vae, {"samples": samples})[0][0] for samples in sampled["samples"].split(1)]
        except Exception as error:
            if len(group) == 1:
                self._fail_or_raise(group[0].ready.item, error, "edited")
                return
            pictures = None  # what follows is outside, so that the tensors of the failed run are free
        if pictures is None:
            comfy.model_management.soft_empty_cache()
            notes.say(f"{len(group)} items in one forward failed; they are run one by one.")
            for one in group:
                self._sample([one])
            return
        for one, picture in zip(group, pictures, strict=True):
            self._write(one, picture)

    def _show_step(self, count: int) -> Callable:
        steps = self.settings.recipe.steps

        def show(step: int, x0: torch.Tensor, x: torch.Tensor, total: int) -> None:
            preview = self._previewer.decode_latent_to_preview_image("JPEG", x0) if self._previewer else None
            self._bar.update_absolute(self._done * steps + (step + 1) * count, self._total * steps, preview)

        return show

    # Writing

    def _write(self, one: "_Encoded", picture: torch.Tensor) -> None:
        """Hand a decoded picture ``[H, W, 3]`` to the writing thread."""
        self._settle(UNWRITTEN - 1)
        ready = one.ready
        path = self.folder / result_name(ready.item, ready.digest)
        own = _parameters(ready, self.settings, one.notes)
        self._unwritten.append(
            (ready.item, self._writer.submit(write_png, path, picture, self.settings.metadata | {"qwen_edit": own}))
        )

    def _settle(self, left: int) -> None:
        """Wait until at most ``left`` results are unwritten."""
        while len(self._unwritten) > left or (self._unwritten and self._unwritten[0][1].done()):
            item, future = self._unwritten.popleft()
            try:
                with stage("save"):
                    name = future.result()
            except OSError as error:
                raise OSError(
                    f"The results can't be written: {error.strerror}. Queue the same batch again to go on where it was."
                ) from None
            except ValueError as error:
                self._fail(_refused(item, error, "written"))
                continue
            self.tally.written += 1
            self.tally.latest.append(name)
            self._count("items_written")
            notes.say(f"{self._done} of {self._total}: wrote {name}")

    def _fail_or_raise(self, item: Item, error: Exception, what: str) -> None:
        if str(error).startswith((WEIGHTS, LORA)):
            raise error
        self._fail(_refused(item, error, what))

    def _fail(self, bad: Refused) -> None:
        logging.warning("Qwen Edit Fast: %s", bad.reason)
        status.keep_error(bad.reason)
        self.tally.failed.append(bad)
        self._count("items_failed")

    def _count(self, what: str) -> None:
        status.count(what)
        self._done += 1
        self._bar.update_absolute(self._done * self.settings.recipe.steps)


@dataclass(frozen=True)
class _Encoded:
    ready: Ready
    positive: list
    negative: list
    latent: dict
    notes: list[str]


def _refused(item: Item, error: Exception, what: str) -> Refused:
    """
    Args:
        what: could not be done to the item, for errors that do not say it themselves.
    """
    if comfy.model_management.is_oom(error):
        why = "[QE_MEMORY] Out of memory. Choose a smaller size for it."
    elif isinstance(error, ValueError) and str(error).startswith("[QE_"):
        why = str(error)
    else:
        logging.info("Qwen Edit Fast: %s", item.where, exc_info=error)
        why = f"{INPUT} It can't be {what} ({type(error).__name__}); the log has more."
    return Refused(item.line, item.name, f"{item.where}: {why}")


def _parameters(ready: Ready, settings: Settings, said: Sequence[str]) -> dict[str, Any]:
    item, recipe = ready.item, settings.recipe
    width, height = ready.sizes[0]
    return {
        "pictures": list(item.pictures),
        "prompt": item.prompt,
        "negative": item.negative,
        "seed": item.seed,
        "width": width,
        "height": height,
        "steps": recipe.steps,
        "true_cfg_scale": recipe.true_cfg_scale,
        "reference_size": settings.reference_size,
        "notes": list(said),
        "digest": ready.digest,
    }
