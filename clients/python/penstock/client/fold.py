"""From response messages to the client's values; shared by the async and the sync client."""

from datetime import timedelta

from penstock import v1
from penstock.client.types import Chunk, Completion, Model, Timings, Usage


def completion(response: v1.GenerateResponse, trace_id: str) -> Completion:
    """The one sample of a unary answer."""
    choice = response.choices[0] if response.choices else v1.Choice()
    return _completion(
        response.summary or v1.Summary(),
        trace_id,
        text=choice.text,
        token_ids=tuple(choice.token_ids),
        finish_reason=choice.finish_reason,
        stop=choice.stop,
    )


class StreamFold:
    """Adds up the messages of one stream."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._last = Chunk()
        self._summary: v1.Summary | None = None

    def add(self, response: v1.StreamResponse) -> Chunk:
        """The chunk that a message stands for; it is empty where the message carries the summary alone."""
        self._summary = response.summary or self._summary
        chunk = Chunk(
            text=response.text,
            token_ids=tuple(response.token_ids),
            finish_reason=response.finish_reason or None,
            stop=response.stop,
        )
        self._texts.append(chunk.text)
        self._token_ids.extend(chunk.token_ids)
        if chunk.finish_reason is not None:
            self._last = chunk
        return chunk

    def completion(self, trace_id: str) -> Completion:
        """What has arrived so far; whole once the stream has ended."""
        return _completion(
            self._summary or v1.Summary(),
            trace_id,
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=self._last.finish_reason or v1.FinishReason.UNSPECIFIED,
            stop=self._last.stop,
        )


def is_empty(chunk: Chunk) -> bool:
    """Whether a chunk tells its reader nothing."""
    return not chunk.text and not chunk.token_ids and chunk.finish_reason is None


def models(response: v1.ListModelsResponse) -> list[Model]:
    """The served models, by name."""
    return [_model(model) for model in response.models]


def _model(model: v1.Model) -> Model:
    return Model(
        name=model.name,
        digest=model.digest,
        tokenizer_digest=model.tokenizer_digest,
        vocab_size=model.vocab_size,
        max_model_tokens=model.max_model_tokens,
        eos_token_ids=tuple(model.eos_token_ids),
        chat=model.chat,
        replicas=tuple(replica.name for replica in model.replicas),
        ready=any(replica.ready for replica in model.replicas),
    )


def _completion(
    summary: v1.Summary,
    trace_id: str,
    *,
    text: str,
    token_ids: tuple[int, ...],
    finish_reason: v1.FinishReason,
    stop: str | None,
) -> Completion:
    return Completion(
        text=text,
        token_ids=token_ids,
        finish_reason=finish_reason,
        stop=stop,
        usage=_usage(summary.usage or v1.Usage()),
        timings=_timings(summary.timings or v1.Timings()),
        seed=summary.seed,
        request_id=summary.request_id,
        model=summary.model,
        replica=summary.replica,
        trace_id=trace_id,
    )


def _usage(usage: v1.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
    )


def _timings(timings: v1.Timings) -> Timings:
    return Timings(
        queue_s=_seconds(timings.queue),
        prefill_s=_seconds(timings.prefill),
        decode_s=_seconds(timings.decode),
    )


def _seconds(duration: timedelta | None) -> float:
    return duration.total_seconds() if duration is not None else 0.0
