"""One forward of the transformer at full size with random weights: ours beside ComfyUI's and diffusers' own.

    python benchmarks/forward.py [--comfyui PATH] [--layers 60] [--side 1024] [--references 1] [--text 280] [--repeat 9] [--profile]
    python benchmarks/forward.py --cold --paths "ours fp8"
    python benchmarks/forward.py --comfyui PATH --paths none --exact-layers 60

References of the output's size, batch 1. Milliseconds are medians of CUDA events (wall time on the CPU). Errors are
relative to a float32 forward (diffusers', the same bf16 weights; float32 products, not tf32) with as many layers as ``--exact-layers``.
"first" is the wait for the first call of each path, with compiling of kernels, in seconds; "other size" and "other
references" the same for the first call at another size and with another number of references. All paths share one set
of weights, so they run one after the other. "accelerate" is our forward over ComfyUI's modules, as QwenEditAccelerate runs it.

"floor" is the time of products and attention alone at the rates that the card reaches with nothing around them
(``ceilings.py``, measured in the same run), "of the rates" the share of them that a forward reaches.

``--cold``: in an empty folder for compiled kernels, and nothing is measured before; of the first path the row says how long
choosing the kernels, compiling them and the first call take together. One path a run.
"""

import argparse
import copy
import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "--cold" in sys.argv:  # before Triton is imported
    COLD = tempfile.TemporaryDirectory()
    os.environ["TRITON_CACHE_DIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = COLD.name

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from ceilings import ceilings, floor
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from environment import environment, keep
from native import accelerated, import_comfyui, native_transformer

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
    choosing: Any = waited(lambda: choose(model, form, attention, device), device)
    model.choosing_s = choosing
    model.modulation = ModulationCache()
    return model.eval()


def choose(model: Any, form: str | None, attention: str, device: torch.device) -> None:
    """Attention and kernels, each tried with real calls, as the loader does."""
    model.attention = resolve(attention, device, DTYPE, 128)
    model.kernels = resolve_kernels(device, DTYPE, activations(form, device, DTYPE))


def diffusers_model(source: QwenEditTransformer) -> QwenImageTransformer2DModel:
    """diffusers' class over the same modules."""
    model = QwenImageTransformer2DModel(num_layers=0, zero_cond_t=True)
    for name, child in source.named_children():
        if name != "pos_embed":
            setattr(model, name, child)
    return model.eval()


class Case:
    """The inputs of one size, in diffusers' form and in ComfyUI's."""

    def __init__(self, side: int, text: int, device: torch.device, references: int = 1):
        self.rows = side // 16
        generator = torch.Generator().manual_seed(side)
        self.latents, *self.references = (
            torch.randn(1, 16, 1, side // 8, side // 8, generator=generator).to(device, DTYPE)
            for _ in range(1 + references)
        )
        self.text = torch.randn(1, text, 3584, generator=generator).to(device, DTYPE)
        self.timestep = torch.tensor([0.703125], device=device)  # exact in bf16
        self.known_timestep = self.timestep.cpu()

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        patches = latents[:, :, 0].unflatten(-1, (self.rows, 2)).unflatten(-3, (self.rows, 2))
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def image_tokens(self) -> tuple[torch.Tensor, list]:
        """Of output and references ``[B, L, 64]``, and their grids for each item."""
        pictures = [self.latents, *self.references]
        grid = (1, self.rows, self.rows)
        return torch.cat([self.tokens(p) for p in pictures], dim=1), [[grid] * len(pictures)] * len(self.latents)

    def diffusers(self, model, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        """Velocity of the output tokens ``[1, L, 64]``."""
        tokens, shapes = self.image_tokens()
        return model(
            hidden_states=tokens.to(dtype),
            encoder_hidden_states=self.text.to(dtype),
            timestep=self.timestep.to(dtype),
            img_shapes=shapes,
            return_dict=False,
        )[0][:, : self.rows**2]

    def times(self, count: int) -> "Case":
        """The same with ``count`` items."""
        many = copy.copy(self)

        def repeated(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.expand(count, *tensor.shape[1:]).contiguous()

        for name in ("latents", "text", "timestep", "known_timestep"):
            setattr(many, name, repeated(getattr(self, name)))
        many.references = [repeated(reference) for reference in self.references]
        return many

    def ours(self, model, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        """As our sampler calls it, which knows the timestep without asking the card."""
        tokens, shapes = self.image_tokens()
        return model(tokens.to(dtype), self.text.to(dtype), None, self.known_timestep, shapes, return_dict=False)[0]

    def native(self, model) -> torch.Tensor:
        velocity = model(self.latents, self.timestep, self.text, ref_latents=self.references)
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
        for form in (None, "fp8"):
            name = f"accelerate {form or 'bf16'}"
            made.append((name, lambda form=form: accelerated(native_transformer(source, form), form), Case.native))
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


def measure(name: str, make, call, case: Case, others: Mapping[str, Case], options, device) -> dict[str, Any]:
    """``others``: further cases, by what the row calls them."""
    model = make()
    first = waited(lambda: call(case, model), device)
    row: dict[str, Any] = {"path": name, "first": round(first, 2)}
    if options.cold and name.startswith("ours"):
        row["first, with kernels chosen and compiled"] = round(model.choosing_s + first, 2)
    row["ms"] = round(milliseconds(lambda: call(case, model), device, options.repeat), 1)
    for what, other in others.items():
        row[f"{what}, first"] = round(waited(lambda other=other: call(other, model), device), 3)
        row[f"{what}, ms"] = round(milliseconds(lambda other=other: call(other, model), device, 3), 1)
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
    if device.type == "cuda" and isinstance(model, torch.nn.Module):
        row["weights GiB"] = round(weights_gib(model), 2)
    if options.profile and name.startswith(options.profile):
        print(profile(lambda: call(case, model)), flush=True)
    return row


def products_in(path: str, device: torch.device) -> str:
    """In what a path multiplies: bf16, fp8 or int8."""
    form = path.partition(",")[0].split()[1]
    if form == "w4a8":
        unpacked = activations(form, device, DTYPE)
        form = "int8" if unpacked == torch.int8 else "bf16" if unpacked is None else "fp8"
    return {"w4a4": "int8"}.get(form, form if form in ("fp8", "int8") else "bf16")


def add_floors(rows: list[dict[str, Any]], found: Mapping[str, float], options, device) -> None:
    image_tokens = (1 + options.references) * (options.side // 16) ** 2
    for row in rows:
        if "ms" in row:
            least = floor(found, products_in(row["path"], device), image_tokens, options.text, options.layers)
            row |= least | {"of the rates": round(least["floor, ms"] / row["ms"], 3)}


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
    """Relative to float32. Its weights of 60 layers take 76 GiB beside the 38 GiB in bf16, so fewer layers on smaller cards."""
    source = random_model(options.exact_layers, device)
    case = Case(options.side, options.text, device, options.references)
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = diffusers_model(source_in_float32(source))
    expected = case.diffusers(exact, torch.float32).double()
    del exact
    let_go(device)
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
        let_go(device)
    return rows


def let_go(device: torch.device) -> None:
    """Of what nothing refers to any more: two models of 60 layers and one in float32 do not fit on a card together."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
    parser.add_argument("--references", type=int, default=1)
    parser.add_argument("--other", type=int, default=832, help="another size; 0 leaves it out")
    parser.add_argument("--other-references", type=int, help="default: one more; 0 leaves it out")
    parser.add_argument("--list", type=int, default=4, help="items of a list in one forward; 0 leaves it out")
    parser.add_argument("--list-side", type=int, default=512)
    parser.add_argument("--text", type=int, default=280, help="text tokens")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument(
        "--paths", help="only those whose names start with one of these, comma between; none: errors only"
    )
    parser.add_argument("--attention", help="further attention backends for ours, comma between")
    parser.add_argument("--cold", action="store_true", help="no kernel is compiled yet; without errors")
    parser.add_argument("--profile", help="print a profile of the path with this name")
    parser.add_argument("--name", default="forward")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.comfyui:
        import_comfyui(options.comfyui.resolve())
    result: dict[str, Any] = {"benchmark": "forward", "environment": environment(), "side": options.side}
    rows: list[dict[str, Any]] = []
    result |= {"references": options.references, "cold": options.cold, "rows": rows}
    rates: dict[str, float] = {}

    def measure_rates() -> None:
        if device.type == "cuda" and options.paths != "none":
            rates.update(ceilings((1 + options.references) * (options.side // 16) ** 2, options.text))
            print(rates, flush=True)
            let_go(device)

    if not options.cold:
        measure_rates()
        if options.exact_layers:
            result["errors"] = {"layers": options.exact_layers, "rows": errors(options, device)}
            let_go(device)
    case, others = Case(options.side, options.text, device, options.references), {}
    if options.other:
        others["other size"] = Case(options.other, options.text, device, options.references)
    more = options.references + 1 if options.other_references is None else options.other_references
    if more:
        others["other references"] = Case(options.side, options.text, device, more)
    source = None if options.paths == "none" else random_model(options.layers, device)
    for name, make, call in [] if source is None else paths(source, options, device):
        try:
            row = measure(name, make, call, case, others, options, device)
        except Exception as e:  # one path that does not run must not lose the others' numbers
            row = {"path": name, "failed": f"{type(e).__name__}: {str(e)[:300]}"}
        rows.append(row)
        print(row, flush=True)
        let_go(device)
    if options.cold:
        source = None
        let_go(device)
        measure_rates()
    if rates:
        result["ceilings"] = rates
        add_floors(rows, rates, options, device)
        print("\n".join(map(str, rows)))
    print(f"Wrote {keep(options.name, result, options.results)}")


if __name__ == "__main__":
    main()
