"""What a person sees on a node."""

from browser import Browser
from comfy_host import PACK_NAME


def on_canvas(browser: Browser, node: int) -> list[str]:
    """Badges on the classic canvas, without the front end's own."""
    words = browser.js(
        "return app.graph.getNodeById(args[0]).badges.map((badge) => (typeof badge === 'function' ? badge() : badge).text)",
        node,
    )
    return [one for one in words if one not in ("", PACK_NAME)]


def in_nodes_2(browser: Browser, node: int) -> list[str]:
    """All words of the element that Nodes 2.0 shows for a node, line by line."""
    return browser.js("return document.querySelector(`[data-node-id='${args[0]}']`)?.innerText ?? ''", node).split("\n")
