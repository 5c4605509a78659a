"""QwenEditLoraSwitch: which resident LoRAs are active, and how strong."""

from comfy_api.latest import io, ui

from ..qwen_edit.needs import explained_imports
from ..qwen_edit.values import check_number
from .host import folders
from .host.request import LORA_MODES

SLOTS = 4
MAX_STRENGTH = 10.0


class QwenEditLoraSwitch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs: list[io.Input] = [
            io.Model.Input(
                "model", tooltip="From Qwen Edit Loader, Qwen Edit Accelerate, or another LoRA switch: they add up."
            )
        ]
        for slot in range(1, SLOTS + 1):
            inputs += [
                io.Combo.Input(
                    f"lora_{slot}",
                    options=folders.loras(),
                    default=folders.NONE,
                    advanced=slot > 2,
                    tooltip="A LoRA from models/loras. It is read once and stays resident; switching costs no loading.",
                ),
                io.Float.Input(
                    f"strength_{slot}",
                    default=1.0,
                    min=-MAX_STRENGTH,
                    max=MAX_STRENGTH,
                    step=0.05,
                    advanced=slot > 2,
                    tooltip="0: resident but switched off. 1: as trained. Negative: the opposite.",
                ),
            ]
        inputs.append(
            io.Combo.Input(
                "mode",
                options=list(LORA_MODES),
                default="auto",
                optional=True,
                advanced=True,
                tooltip="resident: beside the weights; switching costs nothing, each step a little. fused: added to the weights,"
                " no cost per step; a switch takes a moment, and 8-bit weights are rounded once more. auto: fused where the"
                " weights are not quantized, the card has room for a second copy of them and the run is long enough.",
            )
        )
        return io.Schema(
            node_id="QwenEditLoraSwitch",
            display_name="Qwen Edit LoRA Switch",
            category="Qwen Edit Fast",
            has_intermediate_output=True,  # its report is shown again when it comes from the cache
            description="Switches resident LoRAs on and off. Two branches with different LoRAs do not disturb each other.",
            search_aliases=["lightning", "style", "load lora", "lora loader"],
            inputs=inputs,
            outputs=[io.Model.Output(display_name="MODEL")],
        )

    @classmethod
    def execute(cls, model, mode="auto", **slots) -> io.NodeOutput:
        with explained_imports():  # they bring diffusers: only when a node runs
            from .host.accelerate import lora_target
            from .host.lora_switch import switch

        target = lora_target(model)
        wanted = []
        for slot in range(1, SLOTS + 1):
            name, strength = slots.get(f"lora_{slot}", folders.NONE), slots.get(f"strength_{slot}", 1.0)
            check_number(f"strength_{slot}", strength, -MAX_STRENGTH, MAX_STRENGTH)
            if name != folders.NONE:
                wanted.append((folders.lora_path(name), strength))
        clone, lines = switch(model, target, wanted, mode)
        return io.NodeOutput(clone, ui=ui.PreviewText("\n".join(lines) or "No LoRA is switched on."))

    @classmethod
    def fingerprint_inputs(cls, **slots):
        """Runs again when a file behind the same name changed."""
        names = [v for k, v in slots.items() if k.startswith("lora_") and v != folders.NONE]
        return folders.fingerprint_of(folders.lora_path, names)
