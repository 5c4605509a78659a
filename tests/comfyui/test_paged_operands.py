"""Operands over weights of DynamicVRAM are found again as long as it has the same weights on the card.

DynamicVRAM needs a card, so a stand-in has the pages here; the modules and what reads them are the real ones.
"""

import json

import pytest
from comfy_process import run_in_comfyui

pytestmark = pytest.mark.server

CODE = """
import json
import comfy.ops
from comfy.quant_ops import QuantizedTensor
from pack.nodes.host.cast_weights import CastWeights, KnownWeights, PagedOperands
from pack.qwen_edit.kernels import REFERENCE
from pack.qwen_edit.transformer import Forward


class Pages:
    # comfy_aimdo.model_vbar.ModelVBAR: what it has on the card, by the number of the writing
    def __init__(self):
        self.written, self.pinned, self.taken = 1, 0, False

    def fault(self, offset, size):
        if self.taken:
            return None
        self.pinned += 1
        return bytes([self.written])

    def unpin(self, offset, size):
        self.pinned -= 1


def write(module, fp8):
    # as comfy.ops does when the pages do not hold the weight yet
    weight = module.weight.detach().clone()
    module._v_weight = QuantizedTensor.from_float(weight, "TensorCoreFP8E4M3Layout", scale="recalculate") if fp8 else weight
    module._v_bias = module.bias.detach().clone()
    module._v_signature = bytes([module._v[0].written])


def linear(fp8):
    module = comfy.ops.disable_weight_init.Linear(32, 16, dtype=torch.bfloat16)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    module.requires_grad_(False)
    module._v = (Pages(), 0, 1)
    write(module, fp8)
    if fp8:
        module.weight = torch.nn.Parameter(module._v_weight, requires_grad=False)
    return module


def forwards(known, dtype=torch.bfloat16):
    weights = CastWeights(torch.device("cuda"), dtype, known)
    return weights, PagedOperands(weights), Forward(None, REFERENCE, weights, known=PagedOperands(weights))


CHANGES = {
    "nothing": lambda m: None,
    "pages taken": lambda m: setattr(m._v[0], "taken", True),
    "written anew": lambda m: (setattr(m._v[0], "written", 2), write(m, isinstance(m.weight, QuantizedTensor))),
    "to be written anew": lambda m: setattr(m._v[0], "written", 2),
    "another place": lambda m: setattr(m, "_v", None),
    "a LoRA": lambda m: m.weight_function.append(lambda w: w),
    "a hook": lambda m: m.register_forward_hook(lambda *a: None),
    "a forward of its own": lambda m: setattr(m, "forward", lambda x: x),
    "full precision": lambda m: setattr(m, "_full_precision_mm", True),
    "prefetched": lambda m: setattr(m, "_prefetch", {}),
    "another dtype": lambda m: None,
}
result = {}
for fp8 in (False, True):
    for count in (1, 3):
        for name, change in CHANGES.items():
            modules, known = tuple(linear(fp8) for _ in range(count)), KnownWeights()
            for module in modules:
                module.weight_function, module.bias_function = [], []
            weights, _, forward = forwards(known)
            first = forward.operands(*modules)
            held = [m._v[0].pinned for m in modules]
            weights.release()
            assert held == [1] * count and [m._v[0].pinned for m in modules] == [0] * count, held
            pages = [m._v[0] for m in modules]
            change(modules[-1])
            weights, paged, _ = forwards(known, torch.float16 if name == "another dtype" else torch.bfloat16)
            again = paged.operands(modules)
            same = again is not None and len(again) == len(first) == count and all(
                a.weight.data_ptr() == m_weight.data_ptr() and a is b
                for a, b, m_weight in zip(again, first, [m._v_weight._qdata if fp8 else m._v_weight for m in modules])
            )
            weights.release()
            assert all(p.pinned == 0 for p in pages), name
            result.setdefault(name, []).append("same" if same else None if again is None else "other")
print("RESULT", json.dumps(result))
"""


def test_operands_are_found_again_while_their_weights_stay(host):
    found = json.loads(run_in_comfyui(host, CODE).split("RESULT", 1)[1])
    assert found.pop("nothing") == ["same"] * 4
    assert len(found) == 10
    assert found == {change: [None] * 4 for change in found}
