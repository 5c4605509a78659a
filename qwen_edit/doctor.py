"""What is likely to go wrong with an edit that runs without an error: findings, each with what to do about it.

The host gathers facts (``ModelFacts``, ``RunFacts``, ``VaeFacts``); the rules here are pure functions over them, one for
each code. A rule knows only what the released model's settings or a measurement say, and its docstring names which. What
can't run at all is not here: it is a ValueError where it is found.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

NO_MARK = "the missing mark"  # ModelFacts.version_by of ComfyUI's own loaders for a file without one


@dataclass(frozen=True)
class Finding:
    """``code`` is stable, for programs; ``sentence`` says what was found and what to do, for people. "warning": the result
    is probably worse than it need be. "note": worth knowing when it is."""

    code: str
    severity: Literal["warning", "note"]
    sentence: str

    @property
    def line(self) -> str:
        """As nodes and the log show it."""
        return f"Warning: {self.sentence}" if self.severity == "warning" else f"Note: {self.sentence}"


@dataclass(frozen=True)
class ModelFacts:
    """A loaded transformer. ``version_by`` says what told 2511 from 2509, None: nothing did. The reasons (``…_why``) are
    those of the choice; ``flags`` are the options of ComfyUI's command line that change its numerics."""

    model: str
    version: str
    version_by: str | None
    precision: str
    attention: str
    attention_wanted: str
    attention_why: str
    attention_fell_back: bool
    kernels: str
    kernels_why: str
    kernels_fell_back: bool
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoraFacts:
    """An active LoRA: its file's name, strength, and how many modules of the file are applied and skipped (both 0 where
    that is not known)."""

    name: str
    strength: float
    applied: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class RunFacts:
    """One edit that is about to be sampled. ``other_patches``: weights are changed by something whose name is not known."""

    model: str
    version: str
    steps: int
    true_cfg_scale: float
    loras: tuple[LoraFacts, ...] = ()
    other_patches: bool = False


@dataclass(frozen=True)
class VaeFacts:
    """A VAE: its file (or None), the class that ComfyUI reads it as, whether that is the one of this family with 16
    channels, and the model whose own latent statistics it replaces (or None)."""

    name: str | None
    kind: str
    of_this_family: bool
    replaces_that_of: str | None = None


# The files of lightx2v/Qwen-Image-Lightning and what is made from them: "…-Lightning-4steps-V1.0-bf16".
_LIGHTNING = re.compile(r"lightning|(?<![\dv.])[48][-_ ]?steps?(?![a-z])", re.IGNORECASE)
_LIGHTNING_STEPS = re.compile(r"(?<![\dv.])([48])[-_ ]?steps?(?![a-z])", re.IGNORECASE)
LIGHTNING_STEPS = (4, 8)
MANY_SKIPPED = 0.25  # of a file's modules; a LoRA of this model has few that do not fit, if any
MUCH_STRENGTH = 2.0  # a rule of thumb: two LoRAs as they were trained


def is_lightning(name: str) -> bool:
    """Whether a file's name says that it is a Lightning LoRA, or a checkpoint with it fused."""
    return _LIGHTNING.search(name) is not None


def lightning_steps(name: str) -> tuple[int, ...]:
    """The numbers of steps that a Lightning file's name says it was distilled for; those published if it says none."""
    return tuple(sorted({int(steps) for steps in _LIGHTNING_STEPS.findall(name)})) or LIGHTNING_STEPS


def examine_model(facts: ModelFacts) -> tuple[Finding, ...]:
    """Findings on a loaded model, whatever is done with it."""
    return tuple(finding for rule in MODEL_RULES if (finding := rule(facts)) is not None)


def examine_run(facts: RunFacts) -> tuple[Finding, ...]:
    """Findings on one edit by this recipe with these LoRAs."""
    return tuple(finding for rule in RUN_RULES if (finding := rule(facts)) is not None)


def examine_vae(facts: VaeFacts) -> tuple[Finding, ...]:
    """Findings on the VAE that encodes the pictures."""
    return tuple(finding for rule in VAE_RULES if (finding := rule(facts)) is not None)


def _version_guessed(facts: ModelFacts) -> Finding | None:
    """2511 and 2509 do not differ in shape; repackaged files may lack ComfyUI's mark (``checkpoints._version``)."""
    if facts.version_by is not None:
        return None
    return Finding(
        "version-guessed",
        "warning",
        f"nothing in this file or its name says whether it is 2511 or 2509, so {facts.model} runs as {facts.version}; if"
        " that is wrong, choose the other as model_version on the loader.",
    )


def _mark_missing(facts: ModelFacts) -> Finding | None:
    """ComfyUI's own loaders know 2511 by the mark alone (comfy/ldm/qwen_image/model.py) and would run this file as 2509."""
    if facts.version != "2511" or facts.version_by not in ("the file's metadata", "the file's name"):
        return None
    return Finding(
        "mark-missing",
        "note",
        f"{facts.model} lacks the mark of 2511 and runs as 2511 by {facts.version_by}; if it is 2509, choose that as"
        " model_version on the loader.",
    )


def _mark_ignored(facts: ModelFacts) -> Finding | None:
    """The same from the other side: a MODEL of ComfyUI's own loaders, with our forward put in by QwenEditAccelerate."""
    if facts.version_by != NO_MARK or "2511" not in facts.model:
        return None
    return Finding(
        "mark-ignored",
        "warning",
        f"{facts.model} says 2511 by its name and lacks the mark, so ComfyUI's loader runs it as {facts.version}; load it"
        " with Qwen Edit Loader, which goes by the name too.",
    )


def _attention_fell_back(facts: ModelFacts) -> Finding | None:
    """``attention.resolve`` tried it with a real call and took another."""
    if not facts.attention_fell_back:
        return None
    if facts.attention_wanted == "auto":
        what = f"attention {facts.attention} was chosen automatically: {facts.attention_why}"
    else:
        what = (
            f"attention {facts.attention} runs instead of {facts.attention_wanted}: {facts.attention_why}. Choose"
            f" attention 'auto', or make {facts.attention_wanted} run."
        )
    return Finding("attention-fell-back", "warning", what)


def _kernels_fell_back(facts: ModelFacts) -> Finding | None:
    """``kernels.resolve_kernels`` could not use the fused ones."""
    if not facts.kernels_fell_back:
        return None
    return Finding("kernels-fell-back", "warning", f"{facts.kernels_why}. The forward is slower.")


def _fp16(facts: ModelFacts) -> Finding | None:
    """The model's activations pass fp16's range; the sampler refuses NaN rather than making a black picture."""
    if facts.precision != "fp16":
        return None
    return Finding(
        "fp16",
        "warning",
        "fp16 overflows in this model on many pictures, and a result with NaN is refused; choose precision bf16 (or fp32)"
        " on the loader.",
    )


def _sage(facts: ModelFacts) -> Finding | None:
    """8-bit scores: about ten times the error of bf16 (``attention.BOUNDS``), and often blamed for black pictures."""
    if facts.attention != "sage":
        return None
    return Finding(
        "sage",
        "note",
        "sage attention computes in 8 bit and is often blamed for black pictures of this model; if you see artefacts,"
        " choose attention 'pytorch'.",
    )


def _flags(facts: ModelFacts) -> Finding | None:
    """Often blamed for black pictures of this family; ``--fast`` gained nothing here (417 ms a forward with and without,
    on an H100)."""
    if not facts.flags:
        return None
    return Finding(
        "server-flags",
        "note",
        f"ComfyUI runs with {' and '.join(facts.flags)}, which is often blamed for black pictures of this model; if you"
        " see artefacts, start it without.",
    )


def _lightning_sources(facts: RunFacts) -> list[str]:
    names = [facts.model, *(lora.name for lora in facts.loras)]
    return [name for name in names if is_lightning(name)]


def _lightning_twice(facts: RunFacts) -> Finding | None:
    """A fused checkpoint has the LoRA in its weights already; never add it again."""
    names = _lightning_sources(facts)
    if len(names) < 2:
        return None
    fused = is_lightning(facts.model)
    return Finding(
        "lightning-twice",
        "warning",
        f"Lightning is in here twice ({' and '.join(names)}), once too often; switch"
        f" {'the Lightning LoRA off, for it is in the checkpoint already' if fused else 'all but one of them off'}.",
    )


def _lightning_with_guidance(facts: RunFacts) -> Finding | None:
    """Lightning is distilled for true CFG 1."""
    names = _lightning_sources(facts)
    if not names or facts.true_cfg_scale == 1:
        return None
    return Finding(
        "lightning-cfg",
        "warning",
        f"{names[0]} is distilled for true CFG 1 and true_cfg_scale is {facts.true_cfg_scale:g}; choose the preset"
        f" 'Lightning {lightning_steps(names[0])[-1]}', or do without Lightning.",
    )


def _lightning_steps(facts: RunFacts) -> Finding | None:
    """Published for 4 and for 8 steps; up to twice as many, and more than half of them, pass."""
    names = _lightning_sources(facts)
    if not names:
        return None
    steps = lightning_steps(names[0])
    if steps[0] / 2 < facts.steps <= 2 * steps[-1]:
        return None
    return Finding(
        "lightning-steps",
        "warning",
        f"{names[0]} is distilled for {' or '.join(map(str, steps))} steps and this runs {facts.steps}; choose the preset"
        f" 'Lightning {steps[-1]}', or do without Lightning.",
    )


def _lightning_missing(facts: RunFacts) -> Finding | None:
    """Released settings are 40 steps at true CFG 4; 4 or 8 at CFG 1 are for Lightning's weights."""
    few = facts.true_cfg_scale == 1 and facts.steps in LIGHTNING_STEPS
    if not few or facts.other_patches or _lightning_sources(facts):
        return None
    return Finding(
        "lightning-missing",
        "warning",
        f"{facts.steps} steps without guidance need Lightning, and neither {facts.model} nor a LoRA says by its name that it"
        f" is; switch the {facts.steps}-step Lightning LoRA on, or choose the preset 'standard'.",
    )


def _lora_of_another_model(facts: RunFacts) -> Finding | None:
    """What of a file does not fit is skipped; where none does, reading it is an error."""
    for lora in facts.loras:
        total = lora.applied + lora.skipped
        if lora.skipped and lora.skipped >= MANY_SKIPPED * total:
            return Finding(
                "lora-other-model",
                "warning",
                f"{lora.name} fits this model in {lora.applied} of its {total} modules only, so it was probably made for"
                f" another; switch it off, or get the one for Qwen-Image-Edit-{facts.version}.",
            )
    return None


def _strengths(facts: RunFacts) -> Finding | None:
    """A rule of thumb. Lightning's own is not counted: it belongs to the recipe."""
    styles = [lora for lora in facts.loras if not is_lightning(lora.name)]
    total = sum(abs(lora.strength) for lora in styles)
    if len(styles) < 2 or total <= MUCH_STRENGTH:
        return None
    return Finding(
        "lora-strengths",
        "note",
        f"the strengths of {len(styles)} LoRAs add up to {total:g}, and beyond about {MUCH_STRENGTH:g} artefacts are"
        " likely; lower them if you see any.",
    )


def _vae_family(facts: VaeFacts) -> Finding | None:
    """Qwen-Image's VAE is ComfyUI's ``WanVAE`` with 16 channels; FLUX's has 16 too, with another meaning."""
    if facts.of_this_family:
        return None
    return Finding(
        "vae-family",
        "warning",
        f"ComfyUI reads this VAE as {facts.kind}, which is not that of Qwen-Image; connect qwen_image_vae, to VAE Decode too.",
    )


def _vae_statistics(facts: VaeFacts) -> Finding | None:
    """A single file holds no mean and deviation of its latents; a folder's config does, and its transformer was trained
    with those."""
    if facts.replaces_that_of is None:
        return None
    return Finding(
        "vae-statistics",
        "warning",
        f"{facts.replaces_that_of} brings a VAE with latent statistics of its own and {facts.name} replaces it; choose 'from"
        " the model folder' as vae.",
    )


MODEL_RULES: tuple[Callable[[ModelFacts], Finding | None], ...] = (
    _version_guessed,
    _mark_missing,
    _mark_ignored,
    _attention_fell_back,
    _kernels_fell_back,
    _fp16,
    _sage,
    _flags,
)
RUN_RULES: tuple[Callable[[RunFacts], Finding | None], ...] = (
    _lightning_twice,
    _lightning_with_guidance,
    _lightning_steps,
    _lightning_missing,
    _lora_of_another_model,
    _strengths,
)
VAE_RULES: tuple[Callable[[VaeFacts], Finding | None], ...] = (_vae_family, _vae_statistics)

_FOLDERS = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[\\/]{1,2}(?:[^\\/\s:'\"]+[\\/])+")


def without_paths(text: str, *known: str) -> str:
    """The text with absolute paths cut down to what they end in, so that it can be shown to other machines.

    Args:
        known: folders that may hold spaces, which no pattern finds in a text.
    """
    for folder in known:
        text = text.replace(folder, "")
    return _FOLDERS.sub("", text)
