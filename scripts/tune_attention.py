"""Measures every attention that runs on your card and keeps the best for the loader's "auto".

    python scripts/tune_attention.py [--allow-8-bit] [--output FILE]

Run it with the Python of your ComfyUI while ComfyUI is not working, then restart ComfyUI. Run it again after an update
of torch or of an attention library: a file of another environment is not followed, and the loader says so. Without
--allow-8-bit SageAttention is measured and never chosen.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from comfy_host import REPO, write_atomically


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allow-8-bit", action="store_true", help="SageAttention may be chosen if it is right enough")
    parser.add_argument("--device", type=int, default=0, help="number of the CUDA card (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        help="default: user/qwen_edit_fast/attention.json of the ComfyUI that has this pack in custom_nodes;"
        " with --user-directory, the same below that folder",
    )
    options = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("This Python lacks torch. Run it with the Python of your ComfyUI.", file=sys.stderr)
        return 1
    sys.path.append(str(REPO))
    from qwen_edit.attention_auto import TUNED_FILE, tuned_text
    from qwen_edit.tune import Measurement, tune

    output = options.output or default_output(Path(__file__).absolute().parents[1], TUNED_FILE)
    if output is None:
        parser.error("This pack is not in the custom_nodes of a ComfyUI. Say with --output where to write.")
    if not torch.cuda.is_available():
        print("There is no CUDA card here, so there is nothing to measure.", file=sys.stderr)
        return 1

    def show(m: Measurement) -> None:
        if m.problem:
            print(f"{m.tokens:6} tokens  {m.attention:10} {m.problem}", flush=True)
        else:
            print(
                f"{m.tokens:6} tokens  {m.attention:10} {m.ms:9.3f} ms  {m.tflops:6.1f} TFLOP/s  error {m.error:.2g}",
                flush=True,
            )

    device = torch.device("cuda", options.device)
    torch.cuda.set_device(device)
    tuning = tune(device, options.allow_8_bit, show)
    print(f"Attention {tuning.attention}: {tuning.why}.")
    text = tuned_text(tuning.environment, tuning.attention, [asdict(m) for m in tuning.measurements])
    write_atomically(output, text.encode())
    print(f"Wrote {output}")
    return 0


def default_output(pack: Path, name: Path) -> Path | None:
    """``name`` in the default user folder of the ComfyUI that ``pack`` is installed in; None if it is in none."""
    return pack.parents[1] / "user" / name if pack.parent.name == "custom_nodes" else None


if __name__ == "__main__":
    sys.exit(main())
