"""Everything on this machine: the `penstock` command, what starts the roles as processes of their own, and the model in
this process (`LLM`, `LLMEngine`, `AsyncLLM`), which is loaded only when it is asked for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.local.offline.async_llm import AsyncLLM
    from penstock.local.offline.engine import LLMEngine
    from penstock.local.offline.errors import EngineClosed, ExecutorError
    from penstock.local.offline.llm import LLM
    from penstock.local.offline.outputs import CompletionOutput, RequestOutput
    from penstock.local.offline.params import SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineClosed",
    "ExecutorError",
    "LLMEngine",
    "RequestOutput",
    "SamplingParams",
]

_HOMES = {
    "LLM": "llm",
    "LLMEngine": "engine",
    "AsyncLLM": "async_llm",
    "CompletionOutput": "outputs",
    "EngineClosed": "errors",
    "ExecutorError": "errors",
    "RequestOutput": "outputs",
    "SamplingParams": "params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"penstock.local.offline.{_HOMES[name]}"), name)
