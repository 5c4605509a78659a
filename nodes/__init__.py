"""The nodes of the pack, in the order in which an edit uses them."""

from .accelerate import QwenEditAccelerate
from .batch import QwenEditBatch
from .encode import QwenEditEncode
from .loader import QwenEditLoader
from .lora import QwenEditLoraSwitch
from .perf import QwenEditPerfLogger, QwenEditPerfReport
from .references import QwenEditReferenceCache
from .resize import QwenEditRestoreSize, QwenEditSmartResize
from .sampler import QwenEditSampler, QwenEditStepPreset
from .save import QwenEditSave
from .sweep import QwenEditStepSweep

NODES = [
    QwenEditLoader,
    QwenEditAccelerate,
    QwenEditSmartResize,
    QwenEditEncode,
    QwenEditLoraSwitch,
    QwenEditSampler,
    QwenEditStepPreset,
    QwenEditRestoreSize,
    QwenEditPerfLogger,
    QwenEditBatch,
    QwenEditPerfReport,
    QwenEditStepSweep,
    QwenEditReferenceCache,
    QwenEditSave,
]
