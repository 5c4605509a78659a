"""What Python's garbage collector does between edits.

ComfyUI collects after a prompt, every ten seconds, and what is queued next waits until each of the 600,000 objects has been
looked at that its imports have made and that stay for as long as it runs. They are put aside. What is made later is
looked at as before, models above all.
"""

import gc


def register() -> None:
    """Put aside what is there now; called once, when ComfyUI loads the pack. Not later: ComfyUI then makes the cache of what nodes
    returned, and what is put aside never leaves memory if it refers to itself, nor do the models in it."""
    gc.freeze()
