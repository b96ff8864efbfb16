"""POST /v1/completions: plain text continued, without the template."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from octavo.engine.async_request import AsyncRequest
from octavo.engine.outputs import CompletionOutput, RequestOutput
from octavo.serve import responses
from octavo.serve.errors import ERRORS, ApiError
from octavo.serve.logprobs import TextOffsets, completion_logprobs, told_tokens
from octavo.serve.requests import CompletionRequest
from octavo.serve.responses import CompletionLogprobs, Usage
from octavo.serve.sampling import compile_form, completion_params
from octavo.serve.service import EventStream, Service, ServiceDep, merged, unless_gone

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", response_model=responses.Completion, responses=ERRORS)
async def create_completion(
    body: CompletionRequest, http: Request, service: ServiceDep
) -> Response:
    """Continue one prompt or several, at once or as server-sent events."""
    completion = _Completion(body, service)
    if body.stream:
        requests = await unless_gone(http, completion.submit())
        return EventStream(completion.chunks(requests), lambda: service.close(requests))
    answer = await unless_gone(http, completion.answer())
    return Response(responses.to_json(answer), media_type="application/json")


class _Completion:
    """One request to this route. Choice `i` of prompt `p` has the index `p * n + i`."""

    def __init__(self, body: CompletionRequest, service: Service) -> None:
        self.body = body
        self.service = service
        self.tokenizer = service.tokenizer
        self.id = responses.new_id("cmpl")
        self.created = responses.now()
        self.model = service.check_model(body.model)
        self.params = completion_params(body, service.settings, self.tokenizer.vocab_size)
        self.prompts = _prompts(body.prompt)
        limit = service.settings.max_prompts
        if len(self.prompts) > limit:
            raise ApiError(
                400,
                f"prompt: {len(self.prompts)} prompts, but the server takes at most {limit}",
                param="prompt",
            )
        self._offsets: dict[int, TextOffsets] = {}  # by choice

    async def submit(self) -> list[AsyncRequest]:
        """Tokenise the prompts and queue them."""
        self.service.check_room()
        encoded = await self.service.tokenize(self._encode)
        return await self.service.submit(encoded, self.params, "prompt", bool(self.body.stream))

    def _encode(self) -> list[list[int]]:
        compile_form(self.body, self.params, self.tokenizer)
        encode = self.tokenizer.encode
        return [p if isinstance(p, list) else encode(p) for p in self.prompts]

    async def answer(self) -> responses.Completion:
        """All continuations, whole."""
        requests = await self.submit()
        try:
            outputs = [await request.result() for request in requests]
        finally:
            self.service.close(requests)
        choices = [
            self._choice(place, output, answer, 0, 0)
            for place, output in enumerate(outputs)
            for answer in output.outputs
        ]
        return self._envelope(choices, _usage(outputs))

    async def chunks(self, requests: list[AsyncRequest]) -> AsyncIterator[str]:
        """The continuations in pieces, each a chunk's JSON."""
        options = self.body.stream_options
        includes_usage = options is not None and bool(options.include_usage)
        told: dict[int, tuple[int, int]] = {}  # a choice's characters and tokens so far
        ended: set[int] = set()
        finished = []
        async for place, output in merged(requests):
            for answer in output.outputs:
                index = place * self.params.n + answer.index
                if index in ended:
                    continue
                n_text, n_tokens = told.get(index, (0, 0))
                choice = self._choice(place, output, answer, n_text, n_tokens)
                told[index] = (len(answer.text), told_tokens(answer))
                if answer.finish_reason is not None:
                    ended.add(index)
                if choice.text or choice.logprobs or choice.finish_reason:
                    chunk = self._envelope([choice], None)
                    if not includes_usage:
                        chunk.model_fields_set.discard("usage")
                    yield responses.to_json(chunk)
            if output.finished:
                finished.append(output)
        if includes_usage:
            yield responses.to_json(self._envelope([], _usage(finished)))

    def _choice(
        self,
        place: int,
        output: RequestOutput,
        answer: CompletionOutput,
        n_text: int,
        n_tokens: int,
    ) -> responses.CompletionChoice:
        """An answer from its character `n_text` and its token `n_tokens` on."""
        text = answer.text[n_text:]
        if self.body.echo and n_text == 0 and n_tokens == 0:
            text = self._echo(place) + text
        return responses.CompletionChoice(
            index=place * self.params.n + answer.index,
            text=text,
            logprobs=self._logprobs(place, output, answer, n_tokens),
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
        )

    def _echo(self, place: int) -> str:
        """The prompt as text; empty unless asked for."""
        prompt = self.prompts[place]
        if not self.body.echo:
            return ""
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def _logprobs(
        self, place: int, output: RequestOutput, answer: CompletionOutput, start: int
    ) -> CompletionLogprobs | None:
        """Of the answer's tokens from `start` on, after the prompt's if that is echoed."""
        count = self.body.logprobs
        stop = told_tokens(answer)
        if count is None or answer.logprobs is None or (start and start == stop):
            return None
        token_ids = answer.token_ids[start:stop]
        rows: list = list(answer.logprobs[start:stop])
        index = place * self.params.n + answer.index
        if index not in self._offsets:
            self._offsets[index] = TextOffsets(
                self.tokenizer,
                len(self._echo(place)),
                special=not self.params.skip_special_tokens,
            )
        offsets = self._offsets[index].add(token_ids)
        if output.prompt_logprobs is not None and start == 0:
            # <s> is before a text prompt and not in it.
            skipped = int(isinstance(self.prompts[place], str))
            prompt_ids = output.prompt_token_ids[skipped:]
            offsets = TextOffsets(self.tokenizer).add(prompt_ids) + offsets
            token_ids = prompt_ids + token_ids
            rows = output.prompt_logprobs[skipped:] + rows
        return completion_logprobs(self.tokenizer, token_ids, rows, count, offsets)

    def _envelope(
        self, choices: list[responses.CompletionChoice], usage: Usage | None
    ) -> responses.Completion:
        return responses.Completion(
            id=self.id,
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage,
        )


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """One prompt or several, as a list."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [_encodable(prompt)]
    return [_encodable(each) for each in prompt]


def _encodable(prompt: Any) -> Any:
    """Half of a surrogate pair, which JSON can carry and UTF-8 cannot, becomes U+FFFD."""
    if not isinstance(prompt, str):
        return prompt
    return prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _usage(outputs: Sequence[RequestOutput]) -> Usage:
    n_generated = sum(len(answer.token_ids) for o in outputs for answer in o.outputs)
    return responses.usage(
        sum(len(o.prompt_token_ids) for o in outputs),
        n_generated,
        sum(o.num_cached_tokens for o in outputs),
    )
