"""The parts of the fine-tuning script. The models, `BlipImageEvalProcessor` and `chat` can be imported from here.

They are looked up when they are asked for, so that importing a part that needs no torch stays quick.
"""

import importlib
from typing import Any

_HOMES = {
    "VisualGLMModel": "model.visualglm",
    "FineTuneVisualGLMModel": "model.finetune",
    "BlipImageEvalProcessor": "model.data.image_processor",
    "chat": "model.inference.chat",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
