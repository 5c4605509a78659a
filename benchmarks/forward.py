"""One forward of the transformer at full size with random weights: ours beside ComfyUI's and diffusers' own.

    python benchmarks/forward.py [--comfyui PATH] [--layers 60] [--side 1024] [--text 280] [--repeat 9] [--profile]

One reference of the output's size, batch 1. Milliseconds are medians of CUDA events (wall time on the CPU). Errors are
relative to a float32 forward (diffusers', the same bf16 weights; float32 products, not tf32) with as many layers as ``--exact-layers``.
"first" is the wait for the first call of each path, with compiling and choosing of kernels, in seconds; "other size" the
same for the first call at another size. All paths share one set of weights, so they run one after the other.
"""

import argparse
import copy
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from ceilings import ceilings
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from environment import environment, keep
from native import import_comfyui, native_transformer

from qwen_edit.attention import CHOICES, resolve
from qwen_edit.kernels import resolve_kernels
from qwen_edit.linear import pack
from qwen_edit.modulation import ModulationCache
from qwen_edit.quantize import FORMATS, activations, in_its_form, prepare
from qwen_edit.transformer import QwenEditTransformer

DTYPE = torch.bfloat16


def random_model(layers: int, device: torch.device) -> QwenEditTransformer:
    """The 2511 architecture with random bf16 weights."""
    with torch.device("meta"):
        model = QwenEditTransformer(num_layers=layers, zero_cond_t=True)
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = torch.empty(tensor.shape, dtype=DTYPE, device=device).normal_(std=0.02)
        if "norm" in name and tensor.ndim == 1 and name.endswith("weight"):
            state[name] += 1
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def ours(source: QwenEditTransformer, form: str | None, attention: str) -> QwenEditTransformer:
    """Our forward over the weights of ``source``, quantized to ``form``; the modulation is kept, as in the product."""
    with torch.device("meta"):
        model = QwenEditTransformer(num_layers=len(source.transformer_blocks), zero_cond_t=True)
    if form is not None:
        prepare(model, form)
    for name, parameter in source.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = in_its_form(module, leaf, parameter)
        setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))
    for block in model.transformer_blocks:
        attn: Any = block.attn
        pack([attn.to_q, attn.to_k, attn.to_v])
        pack([attn.add_q_proj, attn.add_k_proj, attn.add_v_proj])
    device = source.img_in.weight.device
    model.attention = resolve(attention, device, DTYPE, 128)
    model.kernels = resolve_kernels(device, DTYPE, activations(form, device, DTYPE))
    model.modulation = ModulationCache()
    return model.eval()


def diffusers_model(source: QwenEditTransformer) -> QwenImageTransformer2DModel:
    """diffusers' class over the same modules."""
    model = QwenImageTransformer2DModel(num_layers=0, zero_cond_t=True)
    for name, child in source.named_children():
        if name != "pos_embed":
            setattr(model, name, child)
    return model.eval()


class Case:
    """The inputs of one size, in diffusers' form and in ComfyUI's."""

    def __init__(self, side: int, text: int, device: torch.device):
        self.rows = side // 16
        generator = torch.Generator().manual_seed(side)
        self.latents, self.reference = (
            torch.randn(1, 16, 1, side // 8, side // 8, generator=generator).to(device, DTYPE) for _ in range(2)
        )
        self.text = torch.randn(1, text, 3584, generator=generator).to(device, DTYPE)
        self.timestep = torch.tensor([0.703125], device=device)  # exact in bf16
        self.known_timestep = self.timestep.cpu()

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        patches = latents[:, :, 0].unflatten(-1, (self.rows, 2)).unflatten(-3, (self.rows, 2))
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def diffusers(self, model, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        """Velocity of the output tokens ``[1, L, 64]``."""
        both = torch.cat([self.tokens(self.latents), self.tokens(self.reference)], dim=1)
        grid = (1, self.rows, self.rows)
        return model(
            hidden_states=both.to(dtype),
            encoder_hidden_states=self.text.to(dtype),
            timestep=self.timestep.to(dtype),
            img_shapes=[[grid, grid]] * len(both),
            return_dict=False,
        )[0][:, : self.rows**2]

    def times(self, count: int) -> "Case":
        """The same with ``count`` items."""
        many = copy.copy(self)
        for name in ("latents", "reference", "text", "timestep", "known_timestep"):
            tensor = getattr(self, name)
            setattr(many, name, tensor.expand(count, *tensor.shape[1:]).contiguous())
        return many

    def ours(self, model, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        """As our sampler calls it, which knows the timestep without asking the card."""
        both = torch.cat([self.tokens(self.latents), self.tokens(self.reference)], dim=1).to(dtype)
        grid = (1, self.rows, self.rows)
        shapes = [[grid, grid]] * len(both)
        return model(both, self.text.to(dtype), None, self.known_timestep, shapes, return_dict=False)[0]

    def native(self, model) -> torch.Tensor:
        velocity = model(self.latents, self.timestep, self.text, ref_latents=[self.reference])
        return self.tokens(velocity)


def milliseconds(call: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Median of ``repeat`` calls after two that are not counted; one directly after the other, as a sampler makes them."""
    times = []
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 2)]
        call()
        for mark in marks:
            call()
            mark.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    else:
        for _ in range(repeat + 2):
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times[-repeat:])


def waited(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def paths(source, options, device):
    """Name, how to make it, and how to call it; made one at a time, because two do not always fit."""
    wanted = options.paths.split(",") if options.paths else None

    def selected(name: str) -> bool:
        return wanted is None or any(name.startswith(w) for w in wanted)

    made: list[tuple[str, Callable[[], Any], Callable[[Case, Any], torch.Tensor]]] = [
        ("diffusers eager", lambda: diffusers_model(source), Case.diffusers)
    ]
    if device.type == "cuda":
        made.append(("diffusers compiled", lambda: compiled(source), Case.diffusers))
    if options.comfyui:
        for form in (None, "fp8", "int8"):
            made.append((f"native {form or 'bf16'}", lambda form=form: native_transformer(source, form), Case.native))
    for form in (None, *FORMATS):
        made.append((f"ours {form or 'bf16'}", lambda form=form: ours(source, form, "auto"), Case.ours))
    for attention in options.attention.split(",") if options.attention else ():
        assert attention in CHOICES
        for form in (None, "fp8"):
            name = f"ours {form or 'bf16'}, attention {attention}"
            made.append((name, lambda form=form, a=attention: ours(source, form, a), Case.ours))
    return [entry for entry in made if selected(entry[0])]


def compiled(source):
    model = diffusers_model(source)
    model.compile_repeated_blocks(fullgraph=True)
    return model


def measure(name: str, make, call, case: Case, other: Case, options, device) -> dict[str, Any]:
    model = make()
    row: dict[str, Any] = {"path": name, "first": round(waited(lambda: call(case, model), device), 2)}
    row["ms"] = round(milliseconds(lambda: call(case, model), device, options.repeat), 1)
    if options.other:
        waited_other = waited(lambda: call(other, model), device)
        row["other size, first"] = round(waited_other, 3)
        row["other size, ms"] = round(milliseconds(lambda: call(other, model), device, 3), 1)
    if options.list and name.startswith("ours"):
        one = Case(options.list_side, options.text, device)
        single, together = (
            milliseconds(lambda c=c: call(c, model), device, options.repeat) for c in (one, one.times(options.list))
        )
        row[f"{options.list} of {options.list_side}², one by one and together, ms"] = (
            round(options.list * single, 1),
            round(together, 1),
        )
    first, second = call(case, model), call(case, model)
    row["bit-identical"] = torch.equal(first, second)
    if device.type == "cuda":
        row["weights GiB"] = round(weights_gib(model), 2)
    if options.profile and name.startswith(options.profile):
        print(profile(lambda: call(case, model)), flush=True)
    return row


def weights_gib(model) -> float:
    """Of the linears that a forward reads; the modulation, once computed, needs none."""
    return sum(p.nbytes for n, p in model.named_parameters() if "_mod." not in n) / 2**30


def profile(call: Callable[[], object]) -> str:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as run

    with run(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as result:
        call()
        torch.cuda.synchronize()
    return result.key_averages().table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=60)


def errors(options, device) -> list[dict[str, Any]]:
    """Relative to float32, at full width with fewer layers: float32 weights of 60 layers do not fit beside the others."""
    source = random_model(options.exact_layers, device)
    case = Case(options.side, options.text, device)
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = diffusers_model(source_in_float32(source))
    expected = case.diffusers(exact, torch.float32).double()
    del exact
    rows = []
    for name, make, call in paths(
        source, argparse.Namespace(**{**vars(options), "paths": None, "attention": None}), device
    ):
        if name == "diffusers compiled":
            continue
        model = make()
        error = (call(case, model).double() - expected).norm() / expected.norm()
        rows.append({"path": name, "error": float(f"{error.item():.3g}")})
        print(rows[-1], flush=True)
        del model
    return rows


def source_in_float32(source: QwenEditTransformer) -> QwenEditTransformer:
    with torch.device("meta"):
        model = QwenEditTransformer(num_layers=len(source.transformer_blocks), zero_cond_t=True)
    model.load_state_dict({k: v.float() for k, v in source.state_dict().items()}, assign=True)
    return model


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, help="also measure ComfyUI's own transformer")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--exact-layers", type=int, default=6, help="for the errors; 0 leaves them out")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--other", type=int, default=832, help="another size; 0 leaves it out")
    parser.add_argument("--list", type=int, default=4, help="items of a list in one forward; 0 leaves it out")
    parser.add_argument("--list-side", type=int, default=512)
    parser.add_argument("--text", type=int, default=280, help="text tokens")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--paths", help="only those whose names start with one of these, comma between")
    parser.add_argument("--attention", help="further attention backends for ours, comma between")
    parser.add_argument("--profile", help="print a profile of the path with this name")
    parser.add_argument("--name", default="forward")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.comfyui:
        import_comfyui(options.comfyui.resolve())
    result: dict[str, Any] = {"benchmark": "forward", "environment": environment(), "side": options.side, "rows": []}
    if device.type == "cuda":
        result["ceilings"] = ceilings(2 * (options.side // 16) ** 2, options.text)
        print(result["ceilings"], flush=True)
    if options.exact_layers:
        result["errors"] = {"layers": options.exact_layers, "rows": errors(options, device)}
        gc.collect()
    source = random_model(options.layers, device)
    case, other = (Case(side, options.text, device) for side in (options.side, options.other or options.side))
    for name, make, call in paths(source, options, device):
        try:
            row = measure(name, make, call, case, other, options, device)
        except Exception as e:  # one path that does not run must not lose the others' numbers
            row = {"path": name, "failed": f"{type(e).__name__}: {str(e)[:300]}"}
        result["rows"].append(row)
        print(row, flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"Wrote {keep(options.name, result, options.results)}")


if __name__ == "__main__":
    main()
