"""Chats and their encoding: mistral-common's own V3-Tekken template, with the answer marked."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, cast

from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import InstructRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV3
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

Message = dict[str, Any]


@dataclass
class Chat:
    """Messages whose last one is the assistant's answer, the tools offered, and the task."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    task: str = ""
    expected: Any = None  # what a right answer is compared with


def ask(question: str, answer: str, task: str = "", expected: Any = None) -> Chat:
    """A chat of one question and one answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Chat(messages, task=task, expected=expected)


def call_message(name: str, arguments: dict[str, Any], call_id: str = "null") -> Message:
    """An assistant message which calls one function; "null" is mistral-common's "no id"."""
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"role": "assistant", "tool_calls": [{"id": call_id, "function": function}]}


class ChatEncoder:
    """Encodes chats as `encode_chat_completion` does, without its slow validation."""

    def __init__(self, tokenizer: MistralTokenizer) -> None:
        self.tokenizer = tokenizer
        # V3's own class: the base class lacks `encode_assistant_message`.
        self.instruct = cast(InstructTokenizerV3, tokenizer.instruct_tokenizer)
        self.tekken = self.instruct.tokenizer
        self._tools: dict[str, Tool] = {}

    def text(self, text: str) -> list[int]:
        """The tokens of plain text, without begin or end."""
        return self.tekken.encode(text, bos=False, eos=False)

    def prompt(self, chat: Chat) -> list[int]:
        """The tokens up to the answer."""
        return self._encode(chat.messages[:-1], chat.tools)

    def encode(self, chat: Chat) -> tuple[list[int], int]:
        """All tokens with the closing </s>, and how many of them are the prompt's."""
        prompt = self.prompt(chat)
        answer = self.instruct.encode_assistant_message(_assistant(chat.messages[-1]), False)
        return prompt + answer, len(prompt)

    def _encode(self, messages: list[Message], tools: list[dict[str, Any]]) -> list[int]:
        system = None
        if messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        request: InstructRequest[Any, Tool] = InstructRequest(
            messages=[_message(message) for message in messages],
            system_prompt=system,
            available_tools=[self._tool(tool) for tool in tools] or None,
        )
        return self.instruct.encode_instruct(request).tokens

    def _tool(self, tool: dict[str, Any]) -> Tool:
        key = json.dumps(tool)
        if key not in self._tools:
            self._tools[key] = Tool(function=Function(**tool["function"]))
        return self._tools[key]


def _message(message: Message) -> UserMessage | AssistantMessage | ToolMessage:
    if message["role"] == "user":
        return UserMessage(content=message["content"])
    if message["role"] == "tool":
        return ToolMessage(content=message["content"], tool_call_id=message["tool_call_id"])
    return _assistant(message)


def _assistant(message: Message) -> AssistantMessage:
    if "tool_calls" not in message:
        return AssistantMessage(content=message["content"])
    calls = [
        ToolCall(id=call["id"], function=FunctionCall(**call["function"]))
        for call in message["tool_calls"]
    ]
    return AssistantMessage(tool_calls=calls)
