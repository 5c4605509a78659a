"""Small API-format graphs for the server tests: node id -> {"class_type", "inputs"}."""

from typing import Any

DEMO = "demo (small model of this pack)"
Graph = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def loader(**overrides: Any) -> dict[str, Any]:
    """The demo model, fp32."""
    inputs = {
        "model": DEMO,
        "text_encoder": "from the model folder",
        "vae": "from the model folder",
        "profile": "auto",
        "precision": "fp32",
        "attention": "auto",
        "offload": "auto",
        "model_version": "auto",
    }
    return node("QwenEditLoader", **inputs | overrides)


def edit_graph(
    pictures: list[str], prompt: str, *, preset="standard", seed=7, width=0, height=0, **sampler: Any
) -> Graph:
    """LoadImage … -> loader, encode, sampler, decode -> SaveImage. Decode is node "decode", save "save"."""
    graph: Graph = {"loader": loader()}
    encode = {
        "clip": ["loader", 1],
        "vae": ["loader", 2],
        "prompt": prompt,
        "negative": " ",
        "width": width,
        "height": height,
        "reference_size": "output grid",
    }
    for index, name in enumerate(pictures, 1):
        graph[f"picture_{index}"] = node("LoadImage", image=name)
        encode[f"pictures.picture_{index}"] = [f"picture_{index}", 0]
    graph["encode"] = node("QwenEditEncode", **encode)
    settings = {"steps": 0, "true_cfg_scale": 0.0, "shift": 0.0} | sampler
    graph["sampler"] = node(
        "QwenEditSampler",
        model=["loader", 0],
        positive=["encode", 0],
        negative=["encode", 1],
        latent=["encode", 2],
        preset=preset,
        seed=seed,
        **settings,
    )
    graph["decode"] = node("VAEDecode", samples=["sampler", 0], vae=["loader", 2])
    graph["save"] = node("SaveImage", images=["decode", 0], filename_prefix="edit")
    return graph
