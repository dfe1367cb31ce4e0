"""ModelService: what is served, and its tokenizers."""

import asyncio
from typing import Final

from penstock.service import errors
from penstock.service.calls import Call
from penstock.service.catalogue import Catalogue, ModelFacts
from penstock.service.front import CallContext, Front
from penstock.service.intake import encode, refuse_unbuilt
from penstock.service.text.pool import EncodePool
from penstock.service.validation import check_ids, read_input
from penstock.service.violations import Violations
from penstock.v1 import (
    DetokenizeRequest,
    DetokenizeResponse,
    GetModelRequest,
    GetModelResponse,
    ListModelsRequest,
    ListModelsResponse,
    Model,
    Replica,
    TokenizeRequest,
    TokenizeResponse,
)

SERVICE: Final = "penstock.v1.ModelService"


class Models:
    """Answers from what is known, also while schedulers do not answer."""

    def __init__(self, front: Front, catalogue: Catalogue, pool: EncodePool) -> None:
        self._front = front
        self._catalogue = catalogue
        self._pool = pool

    async def list_models(self, request: ListModelsRequest, context: CallContext) -> ListModelsResponse:
        """All known models, by name."""
        with self._front.call(f"{SERVICE}/ListModels", context):
            return ListModelsResponse(list(map(self._describe, self._catalogue.models().values())))

    async def get_model(self, request: GetModelRequest, context: CallContext) -> GetModelResponse:
        """One model. Raises NOT_FOUND."""
        with self._front.call(f"{SERVICE}/GetModel", context):
            return GetModelResponse(self._describe(self._catalogue.resolve(request.name)))

    async def tokenize(self, request: TokenizeRequest, context: CallContext) -> TokenizeResponse:
        """Encode text or a conversation as a request with it would be. Raises what such a request would."""
        with self._front.call(f"{SERVICE}/Tokenize", context) as call:
            refuse_unbuilt(request)
            model = self._catalogue.resolve(request.model)
            ids = await self._encode(request, model, call)
            return TokenizeResponse(token_ids=ids, max_model_tokens=model.max_model_tokens)

    async def detokenize(self, request: DetokenizeRequest, context: CallContext) -> DetokenizeResponse:
        """Decode token ids. Raises INVALID_ARGUMENT for ids that the model does not have."""
        with self._front.call(f"{SERVICE}/Detokenize", context):
            refuse_unbuilt(request)
            model = self._catalogue.resolve(request.model)
            violations = Violations()
            check_ids(request.token_ids, "token_ids", model.vocab_size, violations)
            if len(request.token_ids) > model.max_model_tokens:
                violations.add("token_ids", f"has more than the {model.max_model_tokens} ids that the model takes")
            if violations:
                raise errors.invalid(violations)
            skip = request.skip_special_tokens is not False
            decode = self._catalogue.tokenizer(model).decode
            text = await asyncio.to_thread(decode, request.token_ids, skip_special_tokens=skip)
            return DetokenizeResponse(text=text)

    async def _encode(self, request: TokenizeRequest, model: ModelFacts, call: Call) -> list[int]:
        violations = Violations()
        prompt = read_input(request.text, request.chat, None, model, violations)
        tokenizer = self._catalogue.tokenizer(model)
        if prompt is None:
            raise errors.invalid(violations)
        add_special_tokens = request.add_special_tokens is not False
        ids = await encode(
            self._pool, prompt, tokenizer, model, call, violations, add_special_tokens=add_special_tokens
        )
        if violations:
            raise errors.invalid(violations)
        return ids.tolist()

    def _describe(self, model: ModelFacts) -> Model:
        tokenizer = self._catalogue.tokenizers.get(model.tokenizer_digest)
        return Model(
            name=model.name,
            digest=model.digest,
            tokenizer_digest=model.tokenizer_digest,
            vocab_size=model.vocab_size,
            max_model_tokens=model.max_model_tokens,
            eos_token_ids=list(model.eos_ids),
            chat=tokenizer is not None and tokenizer.has_chat_template,
            adapters=list(model.adapters),
            replicas=[Replica(one.replica, one.usable) for one in self._catalogue.replicas(model.name)],
        )
