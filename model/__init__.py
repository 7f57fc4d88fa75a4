"""The parts of the fine-tuning script; `VisualGLMModel`, `FineTuneVisualGLMModel` and `chat` can be imported from here.

They are looked up when they are asked for, so that importing a part that needs no torch stays quick.
"""

import importlib
import sys
import types
from typing import Any

_HOMES = {
    "VisualGLMModel": "model.visualglm",
    "FineTuneVisualGLMModel": "model.finetune",
    "chat": "model.chat",
}
__all__ = list(_HOMES)


class _Package(types.ModuleType):
    """This package, whose name `chat` is the function even after Python has put the module of that name there."""

    def __getattribute__(self, name: str) -> Any:
        home = _HOMES.get(name)
        return super().__getattribute__(name) if home is None else getattr(importlib.import_module(home), name)


sys.modules[__name__].__class__ = _Package
