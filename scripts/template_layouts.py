"""What the workflows in workflows/*.json look like: their notes, and where their nodes stand. Read by make_templates.py."""

from __future__ import annotations

from dataclasses import dataclass

HUB = "https://huggingface.co/Comfy-Org"
MODEL_NOTE = """
**Model.** The small demo model runs anywhere and knows a few simple edits, at about 0.07 megapixels. \
With the real weights, choose them in *Load the model* and set *megapixels* to 1.0.
"""
COMPARE_NOTE = """
*Before and after* is ComfyUI's own comparison and shows only with *Nodes 2.0*, a switch in ComfyUI's menu."""


@dataclass(frozen=True)
class Layout:
    """Groups from left to right: a title, and the ids of the nodes from top to bottom.

    A page zoomed to the whole graph draws no texts below 57 %: a graph should stay under 2500 × 1250 units.
    """

    note: str
    groups: tuple[tuple[str, tuple[int, ...]], ...]
    below: tuple[str, ...] = ()  # titles of the groups that stand below the one before, the first below the note
    models: tuple[
        tuple[int, str], ...
    ] = ()  # node, address of the file that it names: the page offers it where it lacks


LAYOUTS = {
    "single_edit": Layout(
        """# Single edit

One picture, one instruction.

1. Choose your picture in *Load picture*.
2. Type what to change in *Instruction*.
3. Run.

The result has the size and place of your picture. *Where the time went* shows what each stage cost.
"""
        + MODEL_NOTE
        + COMPARE_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction", (3, 4)),
            ("Edit", (5,)),
            ("Before and after", (10,)),
            ("Result", (6, 7, 8)),
            ("Measurement", (9,)),
        ),
        below=("Before and after", "Measurement"),
    ),
    "lightning": Layout(
        """# Lightning

Four steps without guidance: about a twentieth of the work of *standard*.

1. Put *Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors* into *models/loras*.
2. Choose it in *The Lightning LoRA goes here*.
3. Run. For the 8-step LoRA, choose the preset *Lightning 8*.

A checkpoint with Lightning in it needs no LoRA. Without either, as here with the demo model, the sampler warns.
*Save* writes lossless WebP, in a third of the time that a PNG takes.
"""
        + MODEL_NOTE
        + COMPARE_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction", (3, 4)),
            ("Lightning", (9, 5)),
            ("Result", (6, 7, 8)),
            ("Before and after", (10,)),
        ),
        below=("Before and after",),
    ),
    "small_card": Layout(
        """# Small card

For cards below 16 GB. Profile *auto* takes the most exact precision that fits (4 bit on these cards), the text encoder \
leaves the card after encoding, and the picture is decoded in tiles. A transformer that still does not fit is streamed \
from RAM; offload *stream* asks for that.

4 bit is visibly less exact than 8 bit.
"""
        + MODEL_NOTE
        + COMPARE_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction", (3, 4)),
            ("Edit", (5,)),
            ("Before and after", (10,)),
            ("Result", (6, 7, 8)),
        ),
        below=("Before and after",),
    ),
    "official_2511_accelerated": Layout(
        """# ComfyUI's own 2511 workflow and one node more

The nodes, files and settings of ComfyUI's template for 2511 without its Lightning switch: shift 3.1, CFGNorm, euler, simple, \
40 steps, CFG 4. There they are folded into one node, *Image Edit (Qwen-Image 2511)*, here they lie open, with one picture.

*Accelerate* stands right before KSampler, behind everything that changes the model. In ComfyUI's own template, or any other \
workflow, the menu puts it there: *Extensions* → *Qwen Edit Fast* → *Accelerate this workflow*.

Bypass it (Ctrl-B) to compare. What it does not honour runs natively, and it says so.

This one needs the real files; ComfyUI offers those that you lack. It does not run with the demo model.
"""
        + COMPARE_NOTE,
        (
            ("Models", (1, 2, 3)),
            ("Picture", (4, 5, 10)),
            ("Instruction", (6, 7)),
            ("Model settings", (8, 9, 11, 12)),
            ("The one node more", (13,)),
            ("Edit", (14, 15)),
            ("Result", (16, 17)),
        ),
        ("Models", "The one node more"),
        (
            (1, f"{HUB}/Qwen-Image-Edit_ComfyUI/resolve/main/split_files/diffusion_models/{{}}"),
            (2, f"{HUB}/HunyuanVideo_1.5_repackaged/resolve/main/split_files/text_encoders/{{}}"),
            (3, f"{HUB}/Qwen-Image_ComfyUI/resolve/main/split_files/vae/{{}}"),
        ),
    ),
    "three_references": Layout(
        """# Three references

One instruction that uses up to three pictures. Name them *picture 1*, *picture 2* and *picture 3*.

The result has the size of picture 1. The model was trained with up to three pictures; the demo model with up to two, \
so what it makes of three is a surprise.
"""
        + MODEL_NOTE,
        (
            ("Model and picture 1", (1, 2)),
            ("Pictures 2 and 3", (3, 10)),
            ("Instruction", (4, 5)),
            ("Edit", (6,)),
            ("Result", (7, 8, 9)),
        ),
    ),
    "two_references": Layout(
        """# Two references

One instruction that uses two pictures. Name them *picture 1* and *picture 2*.

The result has the size of picture 1. More pictures: connect them to the next free input of *Instruction*; \
the model was trained with up to three.
"""
        + MODEL_NOTE,
        (
            ("Model and picture 1", (1, 2)),
            ("Picture 2", (3,)),
            ("Instruction", (4, 5)),
            ("Edit", (6,)),
            ("Result", (7, 8, 9)),
        ),
    ),
    "reference_cache": Layout(
        """# Several pictures, much faster

*Keep the pictures* computes the reference pictures in some steps only and keeps what they contribute for the others. \
With one picture an edit takes about two thirds of the time; with three its steps take less than half.

It is a shortcut: the result differs a little. Both edits here have the same seed, and *Without and with* shows them over \
each other. A smaller *tolerance* is closer, 0 is exact.
"""
        + MODEL_NOTE,
        (
            ("Model and picture 1", (1, 2)),
            ("Picture 2", (3,)),
            ("Instruction", (4, 5)),
            ("Without", (6, 7, 8)),
            ("Keep the pictures", (10, 11, 12, 13)),
            ("Results", (9, 14, 15)),
        ),
        below=("Picture 2",),
    ),
    "list_of_pictures": Layout(
        """# A list of pictures with a prompt each

*List of pictures* and *List of prompts* have the same length: picture 1 gets prompt 1, and so on. One prompt \
for all pictures: type it into *Instructions* instead of the link.

The pictures may have different sizes. They are edited one after the other, each as if it were alone.
"""
        + MODEL_NOTE,
        (
            ("Model", (1,)),
            ("Prompts", (6, 7, 8)),
            ("Pictures", (2, 3, 4)),
            ("Lists and instructions", (5, 9, 10, 11)),
            ("Edit", (12,)),
            ("Results", (13, 14, 15)),
        ),
        below=("Prompts",),
    ),
    "draft_then_high_quality": Layout(
        """# Draft, then high quality

Both samplers start from the same seed and the same encoded instruction, so encoding is done once.

1. Select the nodes of both *High quality* groups and press Ctrl-B to bypass them.
2. Try seeds with the draft until you like one.
3. Press Ctrl-B again and run: the same seed with 60 steps.
"""
        + MODEL_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction and seed", (3, 4, 5)),
            ("Draft", (6,)),
            ("Draft's result", (7, 8, 9)),
            ("High quality", (10,)),
            ("High quality's result", (11, 12, 13)),
        ),
        below=("Model and picture",),
    ),
    "lora_switching": Layout(
        """# LoRA switching

Two branches of one model with different LoRAs. A LoRA is read once and stays resident: switching it on or off, \
or changing its strength, loads nothing and changes no weights.

Strength 0 keeps a LoRA resident but off. Put your own LoRAs into *models/loras*.
"""
        + MODEL_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction", (3, 4)),
            ("LoRAs", (5, 10)),
            ("Edit", (6, 11)),
            ("Sketch", (7, 8, 9)),
            ("Warm film", (12, 13, 14)),
        ),
        below=("Model and picture",),
    ),
    "large_picture_with_mask": Layout(
        """# Large picture with mask

The picture is reduced to a size the model likes, edited, and brought back. Outside the mask every pixel is the \
source's own; the seam is feathered inside the mask.

To paint your own mask, right-click *Load picture and mask* and choose *Open in MaskEditor*. What you paint is \
where the edit may show. Connect an upscale model to *Back to size* to enlarge the edit with it.
"""
        + MODEL_NOTE
        + COMPARE_NOTE,
        (
            ("Model, picture and mask", (1, 2)),
            ("Instruction", (3, 4)),
            ("Edit", (5,)),
            ("Before and after", (9,)),
            ("Result", (6, 7, 8)),
        ),
        below=("Before and after",),
    ),
    "native_ksampler": Layout(
        """# With ComfyUI's KSampler

*Preset for native samplers* sets the model's time shift and guidance for ComfyUI's own samplers. KSampler takes \
its steps and cfg; keep *euler* and *simple*. For SamplerCustom, use its SIGMAS instead.

The result is that of Qwen Edit Sampler with the same preset and seed.
"""
        + MODEL_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction", (3, 4)),
            ("Preset and KSampler", (5, 6)),
            ("Result", (7, 8, 9)),
        ),
    ),
    "batch_of_edits": Layout(
        """# A batch of edits

1. Put a folder of pictures, or a manifest (.csv, .jsonl) with one edit on each line, into ComfyUI's *input* folder.
2. Type its name into *source*. Empty: every picture that lies directly in the input folder.
3. Run. Results appear in *output* as they finish; bad items are listed in *Report* and skipped.

Cancel whenever you like. Run again, and it goes on where it was. Keep the seed fixed: another seed makes new results.
"""
        + MODEL_NOTE,
        (
            ("Model", (1,)),
            ("Batch", (2,)),
            ("Report", (3,)),
        ),
    ),
    "measure_my_card": Layout(
        """# Measure my card

One edit, and a chart of where its time went: per stage, node and step, beside earlier runs, with memory over time and one \
line on what to try.

1. Run. The first run also loads the model.
2. Change the seed and run again: the warm time, beside the cold one.
3. Open *Timing* in the sidebar for the runs so far, and their numbers as JSON or CSV.

The report measures every node of the graph, ComfyUI's own too. Put it into any workflow: it takes a picture and hands it on.
"""
        + MODEL_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction", (3, 4)),
            ("Edit", (5,)),
            ("Result", (6, 7, 8)),
            ("Measurement", (9,)),
        ),
        below=("Model and picture",),
    ),
    "step_sweep": Layout(
        """# Step sweep

The same edit with 4, 8, 12, 20 and 40 steps: what each costs in time, how near it comes to the longest, and where more steps \
stop paying.

Write numbers of steps or names of presets into *sweep*, as *draft, standard, Lightning 8*. Each picture is the one that Qwen \
Edit Sampler makes with the same seed.
"""
        + MODEL_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction", (3, 4)),
            ("Sweep", (5,)),
            ("Pictures", (6,)),
        ),
    ),
}
