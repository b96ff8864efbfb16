"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response

from octavo.engine.async_request import AsyncRequest
from octavo.engine.outputs import CompletionOutput, RequestOutput
from octavo.engine.tool_grammar import hold_to_tools
from octavo.serve import responses
from octavo.serve.answers import AnswerReader
from octavo.serve.errors import ERRORS
from octavo.serve.logprobs import chat_logprobs, told_tokens
from octavo.serve.messages import template_messages, template_tools
from octavo.serve.requests import ChatRequest, NamedToolChoice
from octavo.serve.responses import ChatLogprobs, ChatMessage, FunctionDelta, ToolCallDelta, Usage
from octavo.serve.sampling import chat_params, compile_form, form_as_given
from octavo.serve.service import EventStream, Service, ServiceDep, unless_gone
from octavo.tool_calls import ArgumentsDelta, CallStarted, ContentDelta, Event

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=responses.ChatCompletion, responses=ERRORS)
async def create_chat_completion(body: ChatRequest, http: Request, service: ServiceDep) -> Response:
    """Answer a conversation, at once or as server-sent events."""
    chat = _Chat(body, service)
    if body.stream:
        request = await unless_gone(http, chat.submit())
        return EventStream(chat.chunks(request), lambda: service.close([request]))
    answer = await unless_gone(http, chat.answer())
    return Response(responses.to_json(answer), media_type="application/json")


class _Chat:
    """One request to this route."""

    def __init__(self, body: ChatRequest, service: Service) -> None:
        self.body = body
        self.service = service
        self.tokenizer = service.tokenizer
        self.id = responses.new_id("chatcmpl")
        self.created = responses.now()
        self.model = service.check_model(body.model)
        self.params = chat_params(body, service.settings, self.tokenizer.vocab_size)
        self.offers_tools = bool(body.tools) and body.tool_choice != "none"

    async def submit(self) -> AsyncRequest:
        """Tokenise the conversation and queue it."""
        self.service.check_room()
        prompt_ids = await self.service.tokenize(self._encode)
        streams = bool(self.body.stream)
        return (await self.service.submit([prompt_ids], self.params, "messages", streams))[0]

    def _encode(self) -> list[int]:
        """The prompt, and the constraints that are compiled on the way; not for the event loop."""
        body = self.body
        messages = template_messages(body.messages)
        tools = template_tools(body.tools) if self.offers_tools else None
        further = {"continue_final_message": True} if body.continue_final_message else {}
        prompt_ids = self.tokenizer.encode_chat(messages, tools, **further)
        choice = body.tool_choice
        with form_as_given(body):
            self.params = hold_to_tools(
                self.params,
                self.tokenizer,
                [tool.model_dump() for tool in body.tools or ()],
                choice.model_dump() if isinstance(choice, NamedToolChoice) else choice or "auto",
                body.parallel_tool_calls is not False,
            )
        compile_form(body, self.params, self.tokenizer)
        return prompt_ids

    async def answer(self) -> responses.ChatCompletion:
        """The whole answer."""
        request = await self.submit()
        try:
            output = await request.result()
        finally:
            self.service.close([request])
        return responses.ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[self._choice(answer) for answer in output.outputs],
            usage=_usage(output),
        )

    def _choice(self, answer: CompletionOutput) -> responses.ChatChoice:
        reader = self._reader()
        events = reader.read(answer)
        content = "".join(event.text for event in events if isinstance(event, ContentDelta))
        calls: list[ToolCallDelta] = []
        for event in events:
            if isinstance(event, CallStarted):
                function = FunctionDelta(name=event.name, arguments="")
                calls.append(ToolCallDelta(id=event.id, type="function", function=function))
            elif isinstance(event, ArgumentsDelta):
                calls[event.index].function.arguments += event.text
        message = ChatMessage(
            role="assistant", content=content or None if calls else content, refusal=None
        )
        if calls:
            message.tool_calls = calls
        return responses.ChatChoice(
            index=answer.index,
            message=message,
            logprobs=self._logprobs(answer, 0),
            finish_reason=reader.finish_reason or "stop",
            stop_reason=answer.stop_reason,
        )

    async def chunks(self, request: AsyncRequest) -> AsyncIterator[str]:
        """The answer in pieces, each a chunk's JSON."""
        readers = [self._reader() for _ in range(self.params.n)]
        told = [0] * self.params.n
        for index in range(self.params.n):
            yield self._chunk(index, ChatMessage(role="assistant", content="", refusal=None))
        async for output in request.outputs():
            for answer in output.outputs:
                reader = readers[answer.index]
                if reader.finish_reason is not None:
                    continue
                logprobs = self._logprobs(answer, told[answer.index])
                told[answer.index] = told_tokens(answer)
                deltas = [_delta(event) for event in reader.read(answer)]
                if logprobs is not None and logprobs.content and not deltas:
                    deltas = [ChatMessage(content="")]
                for delta in deltas:
                    yield self._chunk(answer.index, delta, logprobs)
                    logprobs = None
                if answer.finish_reason is not None:
                    yield self._chunk(answer.index, ChatMessage(), None, reader, answer)
            if output.finished and self._includes_usage:
                yield responses.to_json(self._envelope([], _usage(output)))

    def _chunk(
        self,
        index: int,
        delta: ChatMessage,
        logprobs: ChatLogprobs | None = None,
        reader: AnswerReader | None = None,
        answer: CompletionOutput | None = None,
    ) -> str:
        choice = responses.ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=logprobs,
            finish_reason=reader.finish_reason if reader else None,
        )
        if answer is not None:
            choice.stop_reason = answer.stop_reason
        return responses.to_json(self._envelope([choice], None))

    def _envelope(
        self, choices: list[responses.ChatChunkChoice], usage: Usage | None
    ) -> responses.ChatCompletionChunk:
        chunk = responses.ChatCompletionChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=choices,
        )
        if self._includes_usage:
            chunk.usage = usage
        return chunk

    @property
    def _includes_usage(self) -> bool:
        options = self.body.stream_options
        return options is not None and bool(options.include_usage)

    def _reader(self) -> AnswerReader:
        return AnswerReader(self.tokenizer, parses_tools=self.offers_tools)

    def _logprobs(self, answer: CompletionOutput, start: int) -> ChatLogprobs | None:
        """Of the tokens from `start` on; None if not asked for."""
        if answer.logprobs is None:
            return None
        stop = told_tokens(answer)
        return chat_logprobs(
            self.tokenizer,
            answer.token_ids[start:stop],
            answer.logprobs[start:stop],
            self.body.top_logprobs or 0,
        )


def _delta(event: Event) -> ChatMessage:
    if isinstance(event, ContentDelta):
        return ChatMessage(content=event.text)
    if isinstance(event, CallStarted):
        function = FunctionDelta(name=event.name, arguments="")
        call = ToolCallDelta(index=event.index, id=event.id, type="function", function=function)
    else:
        call = ToolCallDelta(index=event.index, function=FunctionDelta(arguments=event.text))
    return ChatMessage(tool_calls=[call])


def _usage(output: RequestOutput) -> Usage:
    n_generated = sum(len(answer.token_ids) for answer in output.outputs)
    return responses.usage(len(output.prompt_token_ids), n_generated, output.num_cached_tokens)
