"""The long runs of the reliability table: a server killed again and again, and hundreds of edits from two clients.

    python benchmarks/soak.py kill --comfyui PATH --kills 10
    python benchmarks/soak.py load --comfyui PATH --edits 500

On the CPU with the demo model; each prints the table's rows and keeps them as JSON.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "scripts"), str(REPO / "tests" / "comfyui")]

from comfy_host import Host
from comfy_server import ComfyServer
from environment import environment, keep
from killing import run_with_kills
from load import run_load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "load"))
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--client-kills", type=int, default=3)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--results", type=Path, help="folder for the result (default: benchmarks/results)")
    options = parser.parse_args()
    host = Host(Path(sys.executable), options.comfyui.resolve())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if options.what == "kill":
            outcome = run_with_kills(host, work, options.items, options.kills, options.client_kills, options.seed)
        else:
            with ComfyServer(host, work, cpu=True) as server:
                outcome = run_load(server, options.edits)
    print(outcome.table())
    result = {"benchmark": f"soak {options.what}", "environment": environment(), **asdict(outcome)}
    print(f"Wrote {keep(f'soak_{options.what}', result, options.results)}")


if __name__ == "__main__":
    main()
