"""What LoRAs cost: one forward at full size with random weights, without and with them, and while they are switched.

    python benchmarks/lora.py [--layers 60] [--side 1024] [--text 280] [--repeat 9] [--switches 100] [--mixed 1000] [--peft]

Stacks: one of rank 32; one of rank 64, as Lightning's; that and three of rank 32. All linears of the blocks but the
modulation have them. "afterwards": the terms are added to each product's result, as peft does, and not as channels of the
product or in its registers (see ``extra_channels.py``). A LoRA changes its weights by 2 %. Errors are of the velocity
with the last stack, relative to float32, with ``--exact-layers``. ``--peft`` measures diffusers with peft beside it.

A switch is a forward with another stack than the one before, less one with the same. "extra ms" is from an idle card to an
idle card; "extra processor ms" is the thread's own time for queueing it at 256², where the card never makes it wait: other work
on the machine does not count.

"fused" is a LoRA of rank 32 in the weights, the originals kept on the card or in pinned memory; "first" makes that
memory, page-locks it as the product does, and fills it. "pays from" is the steps x rank x output tokens from which fusing
and going back cost less than they save (``fused_lora.PAYS_FROM``). The thousand switches are of both kinds, mixed.
"""

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment, keep
from forward import DTYPE, Case, diffusers_model, milliseconds, ours, random_model, source_in_float32

from qwen_edit.extra_channels import ExtraChannels
from qwen_edit.fused_lora import FusedLoras
from qwen_edit.host_memory import HostMemory, page_lock
from qwen_edit.linear import NO_ADAPTERS, LowRank
from qwen_edit.quantize import is_modulation

STACKS = {"rank 32": (32,), "rank 64": (64,), "rank 64 and three of 32": (64, 32, 32, 32)}
STRENGTH = 0.02  # what a LoRA changes, as a share of the weights


def random_lora(model, rank: int, device: torch.device) -> dict[Any, LowRank]:
    layers = {}
    for name, module in model.named_modules():
        if name.startswith("transformer_blocks.") and isinstance(module, torch.nn.Linear) and not is_modulation(name):
            a = torch.empty(rank, module.in_features, dtype=DTYPE, device=device).normal_(std=0.02)
            b = torch.empty(module.out_features, rank, dtype=DTYPE, device=device).normal_(std=STRENGTH / rank**0.5)
            layers[module] = LowRank(a, b, 1.0)
    return layers


def stacked(loras) -> dict[Any, list[LowRank]]:
    return {module: [lora[module] for lora in loras] for module in loras[0]}


def measure(form: str | None, options, device) -> dict[str, Any]:
    source = random_model(options.layers, device)
    model = ours(source, form, "auto")
    del source
    gc.collect()
    case = Case(options.side, options.text, device)
    row: dict[str, Any] = {"form": form or "bf16"}

    def ms() -> float:
        return round(milliseconds(lambda: case.ours(model), device, options.repeat), 1)

    row["without, ms"] = ms()
    before = case.ours(model)
    for name, ranks in STACKS.items():
        loras = [random_lora(model, rank, device) for rank in ranks]
        model.adapters = stacked(loras)
        model.channels = None
        afterwards = ms()
        model.channels = ExtraChannels()
        with_channels = ms()
        model.adapters = NO_ADAPTERS
        row[name] = {
            "ms": with_channels,
            "over without": round(with_channels / row["without, ms"] - 1, 4),
            "afterwards, ms": afterwards,
        }
        print(form, name, row[name], flush=True)
    row["without, afterwards, ms"] = ms()
    row["without, afterwards: the same bits"] = torch.equal(case.ours(model), before)
    row |= switching(model, case, options, device)
    row["fused"] = fusing(model, case, row, options, device)
    return row


def errors(options, device) -> dict[str, Any]:
    """Relative to float32 with the same LoRAs added; "without" is what leaving them out would be off by."""
    source = random_model(options.exact_layers, device)
    case = Case(options.side, options.text, device)
    torch.manual_seed(0)
    parts = [random_lora(source, rank, device) for rank in STACKS["rank 64 and three of 32"]]
    named = {name: [part[module] for part in parts] for name, module in source.named_modules() if module in parts[0]}
    whole = source_in_float32(source)
    whole.adapters = {
        whole.get_submodule(name): [LowRank(a.a.float(), a.b.float(), a.scale) for a in each]
        for name, each in named.items()
    }
    exact = case.ours(whole, torch.float32)
    del whole
    rows = {}
    for form in (None, "fp8", "int8"):
        model = ours(source, form, "auto")
        row = {"without": relative(case.ours(model), exact)}
        model.adapters = {model.get_submodule(name): each for name, each in named.items()}
        row["afterwards"] = relative(case.ours(model), exact)
        model.channels = ExtraChannels()
        row["in the product"] = relative(case.ours(model), exact)
        rows[form or "bf16"] = row
    return rows


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float(f"{((got.double() - expected.double()).norm() / expected.double().norm()).item():.3g}")


def switching(model, case: Case, options, device) -> dict[str, Any]:
    """Extra milliseconds of a forward whose LoRA is another than the one before, whose strength is, or that has one again."""
    loras = [stacked([random_lora(model, 32, device)]) for _ in range(4)]
    weaker = {m: [LowRank(a.a, a.b, 0.5, a.derived) for a in each] for m, each in loras[0].items()}
    for lora in loras:  # read and made ready, as resident ones are
        model.adapters = lora
        case.ours(model)
    small = Case(min(options.side, 256), options.text, device)
    measures = {"ms": (waits, case), "processor ms": (processor_times, small)}
    changes = {
        "another LoRA": itertools.cycle(loras),
        "another strength": itertools.cycle([loras[0], weaker]),
        "on and off": itertools.cycle([loras[0], NO_ADAPTERS]),
    }
    result: dict[str, Any] = {}
    for unit, (measured, of) in measures.items():
        of.ours(model)
        base = measured(lambda of=of: of.ours(model), options.switches, device)
        for name, stacks in changes.items():

            def switch_and_run(stacks=stacks, of=of):
                model.adapters = next(stacks)
                of.ours(model)

            times = measured(switch_and_run, options.switches, device)
            extra = sorted(t - statistics.median(base) for t in times)
            result[f"{name}, extra {unit}"] = {"median": round(statistics.median(extra), 2), "p99": p99(extra)}
        model.adapters = loras[0]
        result[f"the same, p99 above median, {unit}"] = round(p99(base) - statistics.median(base), 2)
    model.adapters = NO_ADAPTERS
    return result


def p99(times: list[float]) -> float:
    return round(sorted(times)[int(len(times) * 0.99)], 2)


def processor_times(call: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Milliseconds of this thread's processor time for each call, the wait for the card left out."""
    times = []
    for _ in range(count):
        begin = time.thread_time()
        call()
        times.append((time.thread_time() - begin) * 1000)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return times


def waits(call: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Milliseconds of each call, from an idle card to an idle card."""
    times = []
    for _ in range(count):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1000)
    return times


class PinnedMemory(HostMemory):
    """Where the originals are kept: page-locked tensor by tensor, as in the product."""

    def __init__(self) -> None:
        super().__init__(self._page_lock if torch.cuda.is_available() else None)
        self.pageable = 0  # bytes that could not be

    def _page_lock(self, address: int, nbytes: int) -> Callable[[], object] | None:
        unlock = page_lock(address, nbytes)
        self.pageable += 0 if unlock else nbytes
        return unlock

    def like(self, weight: torch.Tensor) -> torch.Tensor:
        return self.allocate(weight.nbytes).view(weight.dtype).view(weight.shape)


def fusing(model, case: Case, row: dict[str, Any], options, device) -> dict[str, Any]:
    """What fusing, going back and a step cost."""
    rank = 32
    loras = [stacked([random_lora(model, rank, device)]) for _ in range(2)]
    before = case.ours(model)
    result: dict[str, Any] = {}
    for where, host in (("on the card", None), ("in pinned memory", PinnedMemory())):
        fused = FusedLoras(model)

        def fuse(number: int, fused=fused, host=host) -> None:
            fused.fuse(number, loras[number % 2], host)

        numbers = itertools.count()
        found: dict[str, Any] = {"first, ms": waits(lambda fuse=fuse, n=numbers: fuse(next(n)), 1, device)[0]}
        fused.restore()
        times = {"fuse": [], "go back": []}
        for _ in range(options.repeat):
            times["fuse"] += waits(lambda fuse=fuse, n=numbers: fuse(next(n)), 1, device)
            times["go back"] += waits(fused.restore, 1, device)
        found |= {f"{what}, ms": statistics.median(each) for what, each in times.items()}
        if host is not None:
            copies = list(fused._kept.values())
            target = [torch.empty(copy.shape, dtype=copy.dtype, device=device) for copy in copies]

            def transfer(copies=copies, target=target) -> None:
                for copy, to in zip(copies, target, strict=True):
                    to.copy_(copy, non_blocking=True)

            found["not page-locked, GiB"] = host.pageable / 2**30
            found["transfer alone, ms"] = statistics.median(waits(transfer, options.repeat, device))
            del target
        fuse(next(numbers))
        found["step, ms"] = milliseconds(lambda: case.ours(model), device, options.repeat)
        fused.drop()
        found["afterwards: the same bits"] = torch.equal(case.ours(model), before)
        saved = row["rank 32"]["ms"] - row["without, ms"]
        cost = found["fuse, ms"] + found["go back, ms"]
        found["pays from"] = round(cost / saved * rank * case.rows**2) if saved > 0 else None
        result[where] = {k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()}
        print("fused", where, result[where], flush=True)
    return result


def thousand_switches(options, device) -> dict[str, Any]:
    """On a few layers: the result without LoRA before and after, the LoRAs in turn beside the weights and in them."""
    rows = {}
    for form in (None, "fp8", "int8"):
        model = ours(random_model(2, device), form, "auto")
        model.channels = ExtraChannels()
        case = Case(256, options.text, device)
        before = case.ours(model)
        fused, host = FusedLoras(model), PinnedMemory()
        loras = [stacked([random_lora(model, rank, device)]) for rank in (4, 16, 32, 64)]
        for number, lora in enumerate(itertools.islice(itertools.cycle(loras), options.mixed)):
            beside = number % 3 == 0
            if beside:
                fused.restore()
            else:
                fused.fuse(number, lora, host if number % 3 == 1 else None)
            model.adapters = lora if beside else NO_ADAPTERS
            case.ours(model)
        fused.drop()
        model.adapters = NO_ADAPTERS
        rows[form or "bf16"] = torch.equal(case.ours(model), before)
    return rows


def with_peft(options, device) -> dict[str, Any]:
    """diffusers' transformer with peft's adapters of rank 32."""
    from peft import LoraConfig

    source = random_model(options.layers, device)
    model: Any = diffusers_model(source)
    case = Case(options.side, options.text, device)
    row = {"without, ms": round(milliseconds(lambda: case.diffusers(model), device, options.repeat), 1)}
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    targets += [f"{stream}_mlp.net.{part}" for stream in ("img", "txt") for part in ("0.proj", "2")]
    for name in ("one", "other"):
        model.add_adapter(LoraConfig(r=32, target_modules=targets, init_lora_weights=False), name)
    model.to(device, DTYPE)
    model.set_adapters(["one"])
    row["rank 32, ms"] = round(milliseconds(lambda: case.diffusers(model), device, options.repeat), 1)
    names = itertools.cycle(["other", "one"])
    row["set_adapters, ms"] = round(statistics.median(waits(lambda: model.set_adapters([next(names)]), 20, device)), 1)
    return row


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--exact-layers", type=int, default=4, help="for the errors")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--text", type=int, default=280, help="text tokens")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--switches", type=int, default=100)
    parser.add_argument("--mixed", type=int, default=1000, help="switches after which the bits are compared")
    parser.add_argument("--forms", default="bf16,fp8,int8")
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--name", default="lora")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gc.freeze()  # as the pack does in ComfyUI: a collection that looks at all imports takes longer than a switch
    result: dict[str, Any] = {"benchmark": "lora", "environment": environment(), "side": options.side, "rows": []}
    for form in options.forms.split(","):
        result["rows"].append(measure(None if form == "bf16" else form, options, device))
        print(result["rows"][-1], flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    torch.backends.cuda.matmul.allow_tf32 = False
    result["errors"] = errors(options, device)
    print(result["errors"], flush=True)
    result[f"the same bits after {options.mixed} switches"] = thousand_switches(options, device)
    print(f"the same bits after {options.mixed} switches", list(result.values())[-1], flush=True)
    if options.peft:
        result["peft"] = with_peft(options, device)
        print(result["peft"], flush=True)
    print(f"Wrote {keep(options.name, result, options.results)}")


if __name__ == "__main__":
    main()
