"""What the card reaches at this model's shapes with nothing around it: products and attention, in TFLOP/s; and how long a
forward takes at least at these rates."""

import statistics
from collections.abc import Mapping

import torch

WIDTH, HEADS = 3072, 24
SHAPES = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}


def _tflops(call, flop: float, repeat: int = 9) -> float:
    times = []
    for index in range(repeat + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(end))
    return round(flop / statistics.median(times) / 1e9, 0)


def floor(found: Mapping[str, float], form: str, image_tokens: int, text_tokens: int, layers: int) -> dict[str, float]:
    """What a forward computes, and the milliseconds that takes at the rates of ``ceilings``, each product at its own rate
    (the text stream's at the image stream's) and attention at the best of its rates.

    Counted are the linears of the blocks but the modulation's, 2 x 12 x width² FLOP for each token and layer, and
    attention, 4 x tokens² x width for each layer; all else is left out.

    Args:
        form: of the products: bf16, fp8 or int8.
    """
    tokens = image_tokens + text_tokens
    products = {name: layers * 2 * tokens * n * k / 1e12 for name, (n, k) in SHAPES.items()}
    attention = layers * 4 * tokens**2 * WIDTH / 1e12
    seconds = sum(tflop / found[f"{form} {name}"] for name, tflop in products.items())
    seconds += attention / max(rate for name, rate in found.items() if name.startswith("attention"))
    return {
        "linears, TFLOP": round(sum(products.values()), 1),
        "attention, TFLOP": round(attention, 1),
        "floor, ms": round(seconds * 1000, 1),
    }


def ceilings(image_tokens: int, text_tokens: int) -> dict[str, float]:
    """bf16, fp8 and int8 products of the image stream's shapes, the latter two with a scale for each row (int8: PyTorch's product
    without them, or ours with them, whichever is faster), and attention."""
    from qwen_edit.attention import resolve
    from qwen_edit.kernels.reference import quantize_rows
    from qwen_edit.quantize import quantized_matmul

    device, dtype = torch.device("cuda"), torch.bfloat16
    found = {}
    for name, (n, k) in SHAPES.items():
        x = torch.randn(image_tokens, k, device=device, dtype=dtype)
        w = torch.randn(n, k, device=device, dtype=dtype)
        bias = torch.randn(n, device=device, dtype=dtype)
        flop = 2 * image_tokens * n * k
        found[f"bf16 {name}"] = _tflops(lambda x=x, w=w, b=bias: torch.addmm(b, x, w.t()), flop)
        if torch.cuda.get_device_capability() >= (8, 9):
            a, b = quantize_rows(x, torch.float8_e4m3fn), quantize_rows(w, torch.float8_e4m3fn)
            assert b.scale is not None
            scales = {"scale_a": a.scale, "scale_b": b.scale.t(), "out_dtype": dtype, "use_fast_accum": True}
            found[f"fp8 {name}"] = _tflops(
                lambda a=a, b=b, s=scales, c=bias: torch._scaled_mm(a.data, b.data.t(), bias=c, **s), flop
            )
        a, b = (quantize_rows(t, torch.int8) for t in (x, w))
        assert a.scale is not None
        assert b.scale is not None
        found[f"int8 {name}"] = max(
            _tflops(lambda a=a, b=b: torch._int_mm(a.data, b.data.t()), flop),
            _tflops(
                lambda a=a.data, b=b.data, s=a.scale, t=b.scale, c=bias: quantized_matmul(a, s, b, t, c, dtype), flop
            ),
        )
    tokens = image_tokens + text_tokens
    q, k, v = torch.randn(1, tokens, 3, HEADS, 128, device=device, dtype=dtype).unbind(2)
    for wanted in ("cudnn", "flash4", "pytorch"):
        try:
            choice = resolve(wanted, device, dtype, 128)
        except ValueError:
            continue
        if choice.fell_back:
            print(choice.why)
        else:
            found[f"attention {wanted}"] = _tflops(
                lambda a=choice.attend: a(q, k, v, None), 4 * tokens * tokens * HEADS * 128
            )
    return found
