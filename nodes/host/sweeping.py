"""A step sweep on a real MODEL: the sampler's own function for each point, with one progress bar for all."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import comfy.sd
import comfy.utils
import latent_preview
import torch

from ...qwen_edit.errors import INPUT
from ...qwen_edit.sweep import Outcome, Point, find_knee, likeness
from ...qwen_edit.values import check_has
from . import sampling

MAX_ERROR = 200  # characters of a failure in the table


class _Progress:
    """ComfyUI's progress bar and preview over the steps of all points."""

    def __init__(self, model, points: Sequence[Point]):
        self._total = sum(point.recipe.steps for point in points)
        self._bar = comfy.utils.ProgressBar(self._total)
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self._before = 0

    def each_step(self, step, x0, x, steps) -> None:
        preview = None if self._previewer is None else self._previewer.decode_latent_to_preview_image("JPEG", x0)
        self._bar.update_absolute(self._before + step + 1, self._total, preview)

    def finished(self, point: Point) -> None:
        self._before += point.recipe.steps


def _no_progress(step, x0, x, steps) -> None:
    """The step that warms up is not one that anybody waits for."""


def sweep(
    model, positive, negative, latent: dict, vae, points: Sequence[Point], seed: int
) -> tuple[list[Outcome], int, int | None, list[torch.Tensor | None]]:
    """(outcomes, index of the reference, index of the knee, pictures ``[1, H, W, 3]``), all in the order of the points.

    A point that fails is an outcome with its error, and the others go on. The longest run that succeeded is the reference.
    One step before the first point of each kind loads the model and compiles its kernels, so that no point pays for it.

    Raises:
        ValueError: more than one picture in the LATENT, or another failure of every point.
    """
    sampling.require_ours(model)
    check_has("vae", vae, "decode", "a VAE")
    latent = sampling.native_latent(model, latent)
    if len(latent["samples"]) != 1:
        raise ValueError(f"{INPUT} A sweep takes a LATENT of one picture; this one has {len(latent['samples'])}.")
    progress = _Progress(model, points)
    warmed, outcomes, pictures = set(), [], []
    for point in points:
        outcome = Outcome(point.label, point.recipe.steps, point.recipe.true_cfg_scale)
        picture = None
        try:
            one_step = replace(point.recipe, steps=1)
            if one_step not in warmed:
                warmed.add(one_step)
                sampling.sample(model, positive, negative, latent, one_step, seed, callback=_no_progress)
            start = time.perf_counter()
            # The result lies on the CPU, so this has waited for the card.
            result = sampling.sample(model, positive, negative, latent, point.recipe, seed, callback=progress.each_step)
            outcome = replace(outcome, seconds=round(time.perf_counter() - start, 3))
            picture = vae.decode(result["samples"])
            picture = picture.reshape(-1, *picture.shape[-3:])  # as VAEDecode: a picture is a video of one frame
        except Exception as error:
            # not an interrupt, which is a BaseException and ends the sweep
            logging.warning("Qwen Edit Fast: the sweep's point %s failed.", point.label, exc_info=True)
            text = str(error).split("\n")[0][:MAX_ERROR] or type(error).__name__
            outcome = replace(outcome, seconds=None, error=text)
        progress.finished(point)
        outcomes.append(outcome)
        pictures.append(picture)
    succeeded = [index for index, outcome in enumerate(outcomes) if outcome.error is None]
    if not succeeded:
        raise ValueError(f"{INPUT} Every point of the sweep failed; the first: {outcomes[0].error}")
    reference = max(succeeded, key=lambda index: points[index].evaluations)
    for index in succeeded:
        if index != reference:
            psnr, ssim = likeness(pictures[index], pictures[reference])
            outcomes[index] = replace(outcomes[index], psnr_db=psnr, ssim=ssim)
    return outcomes, reference, find_knee(outcomes, reference), pictures
