"""Quality of the 8- and 4-bit forms, and which linears it depends on.

    python benchmarks/quantization.py [--photographs 4] [--instructions grey,invert,…] [--steps 20] [--scale 4]
    python benchmarks/quantization.py --full-size [--layers 6] [--side 1024]

Without ``--full-size``: the demo model in diffusers' pipeline with our transformer, prepared and filled as the loader
does. *Pictures*: PSNR of a form's picture against the unquantized one of the same seed, on photographs that the model
never saw. *Kinds*: one kind of linear quantized at a time; the relative error of the velocity over transformer calls of
real edits, the PSNR of pictures, the error when everything but this kind is quantized, and what leaving the kind in bf16
takes at full size (60 blocks x 3072). With ``--full-size``: the errors alone, over random weights of full width, and those of each block.

On the CPU activations are float32 and the products are emulated in float, which is the card's arithmetic up to the order
of its sums. Two more rows there: "bf16" is the unquantized transformer in bf16 against float32, what rounding alone does;
the other is w4a4 with comfy-kitchen's 4-bit activations, which the product does not use.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from environment import environment, keep
from PIL import Image

from qwen_edit.attention import resolve
from qwen_edit.checkpoints import transformer_from_folder
from qwen_edit.filling import fill
from qwen_edit.kernels import resolve_kernels
from qwen_edit.modulation import ModulationCache
from qwen_edit.quantize import (
    FORMATS,
    SHARE,
    FourBitLinear,
    QuantizedLinear,
    activations,
    keeps_full_precision,
    prepare,
    quantize_weight,
)
from qwen_edit.transformer import QwenEditTransformer
from training.data import HELD_OUT, held_out_photograph
from training.instructions import EXACT, psnr
from training.pipeline import load_reference_pipeline, reference_area

DEMO = REPO / "demo_model"
INSTRUCTIONS = "grey,invert,sepia,mirror,brighten,red_frame,posterize"
KIND_INSTRUCTIONS = ("grey", "posterize")
FULL_LAYERS = 60

Selects = Callable[[str], bool]


def _ends(*ends: str) -> Selects:
    return lambda name: name.endswith(ends)


def kinds(layers: int) -> dict[str, Selects]:
    """Linears of the blocks by what they do, and those of the first and of the last block."""
    return {
        "attn.to_q": _ends(".to_q"),
        "attn.to_k": _ends(".to_k"),
        "attn.to_v": _ends(".to_v"),
        "attn.to_out": _ends(".to_out.0"),
        "attn.add_q_proj": _ends(".add_q_proj"),
        "attn.add_k_proj": _ends(".add_k_proj"),
        "attn.add_v_proj": _ends(".add_v_proj"),
        "attn.to_add_out": _ends(".to_add_out"),
        "img_mlp up": _ends(".img_mlp.net.0.proj"),
        "img_mlp down": _ends(".img_mlp.net.2"),
        "txt_mlp up": _ends(".txt_mlp.net.0.proj"),
        "txt_mlp down": _ends(".txt_mlp.net.2"),
        "text stream": lambda name: any(part in name for part in (".add_", ".to_add_out", ".txt_mlp.")),
        "first block": lambda name: name.startswith("transformer_blocks.0."),
        "last block": lambda name: name.startswith(f"transformer_blocks.{layers - 1}."),
    }


# Never quantized by the product; measured with rounded weights and float activations.
KEPT: dict[str, Selects] = {
    "modulation": lambda name: "_mod." in name,
    "outside the blocks": lambda name: not name.startswith("transformer_blocks."),
}


class Transformer(QwenEditTransformer):
    """Ours in ``compute``, between a pipeline's float32 tensors."""

    compute = torch.float32

    def forward(self, hidden_states, encoder_hidden_states, **arguments):  # pyright: ignore
        texts = encoder_hidden_states.to(self.compute)
        (velocity, *_) = super().forward(hidden_states.to(self.compute), texts, **arguments)
        return (velocity.to(hidden_states.dtype),)


def quantize_only(model: nn.Module, selects: Selects) -> None:
    """Make all quantized linears but the selected plain ones again; before the weights are read."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear) and not selects(name):
            plain = nn.Linear(module.in_features, module.out_features, device="meta", dtype=module.weight.dtype)
            model.set_submodule(name, plain)


def round_weights(model: nn.Module, form: str, selects: Selects) -> None:
    """The selected linears' weights as ``form`` would keep them, in float."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and keeps_full_precision(name) and selects(name):
            module.weight.data = quantize_weight(module.weight.data, form).dequantize()


def demo_transformer(
    form: str | None, device: torch.device, dtype: torch.dtype, selects: Selects | None = None
) -> Transformer:
    """The demo model's transformer as the loader makes it; ``selects``: only these linears in ``form``."""
    source = transformer_from_folder(DEMO)
    with torch.device("meta"):
        model = Transformer.from_config(dict(source.config)).eval()
    nn.Module.to(model, dtype)
    prepare(model, form)
    if selects is not None:
        quantize_only(model, selects)
    fill(model, source, dtype, device)
    return configured(model, form, device, dtype)


def configured(model: Transformer, form: str | None, device: torch.device, dtype: torch.dtype) -> Transformer:
    model.compute = dtype
    model.attention = resolve("auto", device, dtype, model.config.attention_head_dim)
    model.kernels = resolve_kernels(device, dtype, activations(form, device, dtype))
    model.modulation = ModulationCache()
    return model


def with_4_bit_activations(model: Transformer) -> Transformer:
    """Multiply 4-bit weights as comfy-kitchen does by default on cards with int4 units, and on the CPU."""
    for module in model.modules():
        if isinstance(module, FourBitLinear):
            module.forward = partial(nn.Linear.forward, module)
    return model


def edit(pipeline, photograph: np.ndarray, prompt: str, options) -> np.ndarray:
    """The pipeline's picture ``[H, W, 3]`` in [0, 1]; the reference's grid is the output's."""
    height, width = photograph.shape[:2]
    with reference_area(height * width):
        return pipeline(
            image=[Image.fromarray(photograph)],
            prompt=prompt,
            negative_prompt=" " if options.scale > 1 else None,
            true_cfg_scale=options.scale,
            num_inference_steps=options.steps,
            height=height,
            width=width,
            generator=torch.Generator().manual_seed(options.seed),
            output_type="np",
        ).images[0]


def decibels(pipeline, transformer, cases: Iterable[tuple[str, str]], expected: dict, options) -> dict:
    """PSNR of each case (instruction, photograph) against its expected picture; None as expected: the pictures."""
    pipeline.transformer = transformer
    result = {}
    for instruction, photograph in cases:
        source = held_out_photograph(photograph, options.side, options.side)
        picture = edit(pipeline, source, EXACT[instruction].prompts[0], options)
        result[instruction, photograph] = psnr(picture, expected[instruction, photograph]) if expected else picture
    return result


def pictures(pipeline, cases, expected, options, device, dtype) -> list[dict[str, Any]]:
    paths: dict[str, Callable[[], Transformer]] = {}
    if device.type == "cpu" and tuple(options.forms) == FORMATS:
        paths["bf16"] = lambda: demo_transformer(None, device, torch.bfloat16)
        paths["w4a4, activations 4 bit"] = lambda: with_4_bit_activations(demo_transformer("w4a4", device, dtype))
    for form in options.forms:
        paths[form] = lambda form=form: demo_transformer(form, device, dtype)
    rows = []
    for form, make in paths.items():
        transformer = make()
        found = decibels(pipeline, transformer, cases, expected, options)
        each = {name: [v for (i, _), v in found.items() if i == name] for name, _ in cases}
        row = {
            "form": form,
            "median": round(statistics.median(found.values()), 2),
            "minimum": round(min(found.values()), 2),
            "of": " ".join(min(found, key=lambda case: found[case])),
            "instructions": {name: round(statistics.median(values), 2) for name, values in each.items()},
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def recorded_calls(pipeline, transformer, cases, options) -> list[dict[str, Any]]:
    """Arguments of the transformer at the start, in the middle and near the end of edits."""
    pipeline.transformer, calls = transformer, []
    hook = transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    chosen = []
    for case in cases:
        calls.clear()
        decibels(pipeline, transformer, [case], {}, options)
        chosen += [calls[round(share * (len(calls) - 1))] for share in (0.0, 0.5, 0.9)]
    hook.remove()
    return chosen


def velocities(transformer, calls: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [transformer(**call)[0].double() for call in calls]


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Root mean square over the calls."""
    errors = [((f - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True)]
    return statistics.fmean(e * e for e in errors) ** 0.5


def bytes_of_keeping() -> Callable[[Selects, str], float]:
    """GiB that the full-size model grows by when the selected linears stay in bf16."""
    with torch.device("meta"):
        model = QwenEditTransformer(num_layers=FULL_LAYERS)
    linears = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear)}

    def gib(selects: Selects, form: str) -> float:
        return sum(c for n, c in linears.items() if selects(n)) * 2 * (1 - SHARE[form]) / 2**30

    return gib


def print_row(row: dict[str, Any]) -> None:
    values = "  ".join(f"{key} {value}" for key, value in row.items() if key not in ("form", "kind"))
    print(f"{row['form']:5} {row['kind']:20} {values}", flush=True)


def demo(options, device, dtype) -> dict[str, Any]:
    pipeline = load_reference_pipeline(DEMO, device=device)
    layers = transformer_from_folder(DEMO).config["num_layers"]
    names = options.instructions.split(",")
    cases = [(name, photograph) for name in names for photograph in HELD_OUT[: options.photographs]]
    few = [case for case in cases if case[0] in KIND_INSTRUCTIONS and case[1] == HELD_OUT[0]] or cases[:1]
    unquantized = demo_transformer(None, device, dtype)
    expected = decibels(pipeline, unquantized, cases, {}, options)
    result: dict[str, Any] = {"pictures": pictures(pipeline, cases, expected, options, device, dtype)}
    if not options.kinds:
        return result

    calls = recorded_calls(pipeline, unquantized, few, options)
    exact, gib = velocities(unquantized, calls), bytes_of_keeping()
    full, rows = kinds(FULL_LAYERS), []
    for form in options.forms:

        def measured(transformer, name: str, with_pictures: bool = True, form=form) -> dict[str, Any]:
            row = {"form": form, "kind": name, "error": shown(relative_error(velocities(transformer, calls), exact))}
            if with_pictures:
                found = decibels(pipeline, transformer, few, expected, options)
                row["dB"] = round(statistics.median(found.values()), 1)
            return row

        rows.append(measured(demo_transformer(form, device, dtype), "all"))
        print_row(rows[-1])
        for name, selects in kinds(layers).items():
            row = measured(demo_transformer(form, device, dtype, selects), name)
            others = demo_transformer(form, device, dtype, lambda n, s=selects: not s(n))
            row["all but these"] = measured(others, name, False)["error"]
            row["GiB to keep"] = round(gib(full[name], form), 2)
            rows.append(row)
            print_row(row)
        for name, selects in KEPT.items():
            rounded = demo_transformer(None, device, dtype)
            round_weights(rounded, form, selects)
            rows.append(measured(rounded, f"({name})"))
            print_row(rows[-1])
    return result | {"kinds": rows, "kinds_cases": [" ".join(case) for case in few]}


def full_size(options, device, dtype) -> dict[str, Any]:
    """Errors over random weights of full width, of kinds and of single blocks; relative to the unquantized forward in the same
    dtype. One model, whose linears are swapped for their quantized twins."""
    from forward import Case, random_model

    model = full_size_transformer(random_model(options.layers, device), dtype)
    case = Case(options.side, options.text, device)

    def velocity(form: str | None) -> list[torch.Tensor]:
        model.kernels = resolve_kernels(device, dtype, activations(form, device, dtype))
        return [case.diffusers(model, dtype).double()]

    configured(model, None, device, dtype)
    expected, gib, rows = velocity(None), bytes_of_keeping(), []
    full = kinds(FULL_LAYERS)
    for form in options.forms:
        twins = quantized_twins(model, form)

        def error(selects: Selects, form=form, twins=twins) -> float:
            with swapped(model, {name: twin for name, twin in twins.items() if selects(name)}):
                return shown(relative_error(velocity(form), expected))

        def add(row: dict[str, Any], form=form) -> None:
            rows.append({"form": form} | row)
            print_row(rows[-1])

        add({"kind": "all", "error": error(lambda name: True)})
        for name, selects in kinds(options.layers).items():
            row = {"kind": name, "error": error(selects), "all but these": error(lambda n, s=selects: not s(n))}
            add(row | {"GiB to keep": round(gib(full[name], form), 2)})
        for index in range(options.layers):
            prefix = f"transformer_blocks.{index}."
            add({"kind": f"block {index}", "error": error(lambda name, p=prefix: name.startswith(p))})
    return {"layers": options.layers, "kinds": rows}


def full_size_transformer(source: QwenEditTransformer, dtype: torch.dtype) -> Transformer:
    """``source``'s weights in a transformer for ``configured``, none of them quantized."""
    with torch.device("meta"):
        model = Transformer(num_layers=len(source.transformer_blocks), zero_cond_t=True)
    prepare(model, None)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in source.state_dict().items()}, assign=True)
    return model.eval().requires_grad_(False)


def quantized_twins(model: Transformer, form: str) -> dict[str, Any]:
    """By name, what the linears are in ``form`` that the product quantizes."""
    with torch.device("meta"):
        shell = Transformer(num_layers=len(model.transformer_blocks), zero_cond_t=True)
    prepare(shell, form)
    twins: dict[str, Any] = {n: module for n, module in shell.named_modules() if isinstance(module, QuantizedLinear)}
    for name, twin in twins.items():
        plain: Any = model.get_submodule(name)
        twin.weight = nn.Parameter(quantize_weight(plain.weight, form), requires_grad=False)
        twin.bias = plain.bias
    return twins


@contextmanager
def swapped(model: nn.Module, modules: dict[str, Any]) -> Iterator[None]:
    before = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        model.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def shown(value: float) -> float:
    return float(f"{value:.3g}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, help="pixels; default 128, with --full-size 1024")
    parser.add_argument("--photographs", type=int, default=len(HELD_OUT), help=f"the first of {', '.join(HELD_OUT)}")
    parser.add_argument("--instructions", default=INSTRUCTIONS, help="comma between")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=4.0, help="true CFG; 4 is the preset standard's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--kinds", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--layers", type=int, default=6, help="of the full-size model")
    parser.add_argument("--text", type=int, default=280, help="text tokens of the full-size model")
    parser.add_argument("--name", help="of the result file; default quantization_cpu or quantization_cuda")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    options.side = options.side or (1024 if options.full_size else 128)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    measured = full_size(options, device, dtype) if options.full_size else demo(options, device, dtype)
    settings = {k: v for k, v in vars(options).items() if k not in ("name", "results")}
    name = options.name or f"quantization_{'full_size_' if options.full_size else ''}{device.type}"
    result = {"benchmark": "quantization", "environment": environment(), "settings": settings} | measured
    print(f"Wrote {keep(name, result, options.results)}")


if __name__ == "__main__":
    main()
