"""What a running node has to say that is known only while it runs: shown on it by ComfyUI's front end."""

import logging

from comfy_execution.utils import get_executing_context
from server import PromptServer


def say(text: str) -> None:
    """Show a line on the node that is being executed, and log it."""
    logging.info("Qwen Edit Fast: %s", text)
    context = get_executing_context()
    if context is not None:
        PromptServer.instance.send_progress_text(text, context.node_id)
