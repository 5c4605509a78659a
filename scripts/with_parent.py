"""Runs a Python program that ends with the process that started it, however that ends, even by kill -9.

    python with_parent.py main.py ...

Standard input is the parent's pipe: when the parent is gone, the system closes it.
"""

import os
import runpy
import sys
import threading


def _end_with_the_pipe() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_pipe, daemon=True).start()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
