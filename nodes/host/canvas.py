"""What the browser extension asks the server, so that it need not know it itself.

``GET /qwen_edit/recipes``: the step presets, by name, in the order of the combo.
``GET /qwen_edit/loras``: the LoRAs that are resident at the moment.
"""

import sys

from aiohttp import web
from server import PromptServer

from ...qwen_edit.recipes import PRESETS, Recipe, StaticShift


def register() -> None:
    """Add the routes to ComfyUI's server; called once, when ComfyUI loads the pack."""
    routes = PromptServer.instance.routes
    routes.get("/qwen_edit/recipes")(_recipes)
    routes.get("/qwen_edit/loras")(_loras)


def _facts(recipe: Recipe) -> dict[str, float | int | None]:
    """``shift`` is null where it is dynamic."""
    shift = recipe.shift.shift if isinstance(recipe.shift, StaticShift) else None
    return {"steps": recipe.steps, "true_cfg_scale": recipe.true_cfg_scale, "shift": shift}


async def _recipes(_: web.Request) -> web.Response:
    return web.json_response({name: _facts(recipe) for name, recipe in PRESETS.items()})


async def _loras(_: web.Request) -> web.Response:
    """Names without folders, and MiB. The pool's module brings diffusers and is imported when the first LoRA is switched
    on: until then there is none, and asking must not import it."""
    module = sys.modules.get(f"{__package__}.lora")
    found = [] if module is None else module.residents()
    return web.json_response([{"name": name, "mib": round(size / 2**20, 2)} for name, size in found])
