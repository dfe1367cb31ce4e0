"""From a request to its sequences."""

from penstock.executor.step import MAX_STOP_IDS, ModelInfo, Stopping, pack_u32, unpack_u32
from penstock.scheduler.core.sequence import Sequence
from penstock.scheduler.records.commands import Submit


def sequences_of(request: Submit, info: ModelInfo) -> list[Sequence]:
    """A sequence for each sample, nothing of it computed.

    Raises ValueError for what could never run: no prompt, no room for output, a column that is none, too many stop
    ids. The gate refuses all that with better words; one that it lets through must not block the queue for ever.
    """
    prompt = unpack_u32(request.prompt_ids)
    # One limit for core and device: what the request asks for, cut to what the model has room for.
    most = min(request.max_tokens, info.max_model_tokens - len(prompt))
    if not prompt or most < 1:
        raise ValueError(f"{len(prompt)} ids and {request.max_tokens} more do not fit {info.max_model_tokens} tokens")
    own = unpack_u32(request.stop_ids)
    stop_ids = frozenset(own) if request.ignore_eos else frozenset(own).union(info.eos_ids)
    if len(stop_ids) > MAX_STOP_IDS:
        raise ValueError(f"{len(stop_ids)} stop ids, at most {MAX_STOP_IDS} are possible")
    stopping = Stopping(most, request.min_tokens, pack_u32(sorted(stop_ids)))
    return [
        Sequence(
            sample.handle,
            prompt + unpack_u32(sample.delivered_ids),
            len(prompt),
            stopping,
            stop_ids,
            len(prompt) + most,
            request.arrival_ns,
            sampling=request.sampling,
            seed=sample.seed,
            sample_index=sample.index,
            deadline_ns=request.deadline_ns,
            tenant=request.tenant,
            priority_class=request.priority_class,
            traced=request.traced,
        )
        for sample in request.samples
    ]
