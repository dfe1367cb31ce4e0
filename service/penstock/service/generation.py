"""GenerationService: `Generate` and `Stream`."""

from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

from penstock.service.calls import Call
from penstock.service.front import CallContext, Front
from penstock.service.intake import Intake, Running
from penstock.v1 import (
    Choice,
    GenerateRequest,
    GenerateResponse,
    SampleFinished,
    StreamRequest,
    StreamResponse,
    Summary,
    Timings,
    Usage,
)

SERVICE: Final = "penstock.v1.GenerationService"


class Generation:
    """Serves any number of calls at once; what it holds is shared and owned elsewhere."""

    def __init__(self, front: Front, intake: Intake) -> None:
        self._front = front
        self._intake = intake

    async def generate(self, request: GenerateRequest, context: CallContext) -> GenerateResponse:
        """Answer once, with everything."""
        texts, token_ids = [], array("I")
        with self._front.call(f"{SERVICE}/Generate", context) as call:
            async with self._running(request, call) as running:
                async for piece in running.delivery:
                    texts.append(piece.text)
                    token_ids.extend(piece.token_ids)
                summary = await _conclude(running, call)
                choice = Choice(
                    text="".join(texts),
                    token_ids=token_ids.tolist(),
                    finish_reason=running.delivery.finish_reason,
                    stop=running.delivery.stop,
                )
        return GenerateResponse(choices=[choice], summary=summary)

    async def stream(self, request: StreamRequest, context: CallContext) -> AsyncIterator[StreamResponse]:
        """Answer with what there is whenever the caller takes it, at the end with the summary."""
        with self._front.call(f"{SERVICE}/Stream", context) as call:
            async with self._running(request.request or GenerateRequest(), call) as running:
                async for piece in running.delivery:
                    yield StreamResponse(text=piece.text, token_ids=piece.token_ids.tolist())
                summary = await _conclude(running, call)
                yield StreamResponse(
                    finish_reason=running.delivery.finish_reason,
                    stop=running.delivery.stop,
                    summary=summary,
                )

    @asynccontextmanager
    async def _running(self, request: GenerateRequest, call: Call) -> AsyncIterator[Running]:
        running = await self._intake.start(request, call)
        try:
            yield running
        finally:
            running.close(call.cancel_reason)


async def _conclude(running: Running, call: Call) -> Summary:
    """The summary of what was delivered whole."""
    end = await running.end()
    usage = Usage(
        prompt_tokens=running.prompt_tokens,
        cached_tokens=end.cached_tokens,
        completion_tokens=running.delivery.completion_tokens,
    )
    reason = (running.delivery.finish_reason.name or "other").lower()
    call.note("prompt_tokens", usage.prompt_tokens, attribute="gen_ai.usage.input_tokens")
    call.note("completion_tokens", usage.completion_tokens, attribute="gen_ai.usage.output_tokens")
    call.note("finish_reason", reason)
    call.span.set_attribute("gen_ai.response.finish_reasons", [reason])
    return Summary(
        request_id=running.request_id,
        model=running.model.name,
        usage=usage,
        timings=_timings(end),
        seed=running.seed,
        priority=running.priority,
        replica=running.link.replica,
    )


def _timings(end: SampleFinished) -> Timings:
    return Timings(
        queue=timedelta(microseconds=end.queue_us),
        prefill=timedelta(microseconds=end.prefill_us),
        decode=timedelta(microseconds=end.decode_us),
    )
