"""`LLM`: chats and prompts in, answers out, as vLLM's callers know it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from octavo.cache import kv_dtype
from octavo.cache.planner import check_budget, default_memory
from octavo.checkpoint import open_checkpoint, resolve_model
from octavo.config import parse_bytes
from octavo.device import choose_device, current
from octavo.engine.defaults import MAX_NUM_BATCHED_TOKENS
from octavo.engine.engine import Engine, check_context, check_positive
from octavo.engine.outputs import RequestOutput
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.tool_grammar import ToolChoice, hold_to_tools
from octavo.errors import ConfigError, RequestError
from octavo.model import Transformer
from octavo.tokenizer import Tokenizer
from octavo.tool_calls import split_answer

Message = Any  # OpenAI's dict or one of mistral-common's messages

logger = logging.getLogger("octavo")


class LLM:
    """A model with its tokenizer, ready to answer.

    Args:
        model: a folder, a hub id, or `demo`.
        tokenizer: a tokenizer file to use instead of the model's own.
        tokenizer_mode: `auto` or `mistral`, which are the same here.
        config_format, load_format: `auto`, `mistral` or `hf`.
        max_model_len: tokens of prompt and answer together; None is the model's context.
        device: `cpu`, `cuda`, `cuda:1`, or `auto`, which is a GPU if there is one.
        dtype: of weights and computation; `auto` is the checkpoint's.
        attention_pattern: such as `128k,32k,32k,32k`, in place of the checkpoint's own.
        max_num_seqs: answers in the making at once; None is 64 on a GPU, 16 elsewhere.
        max_num_batched_tokens: tokens in one forward pass.
        memory: bytes of the device for weights, KV cache and all else, or a text such as `16G`;
            None takes most of what is free.
        kv_cache_dtype: of keys and values in the cache: `auto` (the model's), `bf16`, or `int8`
            with a scale for each token and head.
        enable_prefix_caching: whether prompts that begin alike are computed once.
        prompt_lookup: whether tokens are guessed from the text before them and checked several in
            one pass; the answers are the same.
        cuda_graphs: whether a GPU replays steps of few tokens from captured graphs.
        tensor_parallel: taken as the model card has it, and comes later: one device for now.

    Raises:
        ConfigError, CheckpointError, TokenizerError: with the file at fault and what to do.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        tokenizer_mode: str = "auto",
        config_format: str = "auto",
        load_format: str = "auto",
        max_model_len: int | None = None,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = "auto",
        attention_pattern: str | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
        memory: int | str | None = None,
        kv_cache_dtype: str = "auto",
        enable_prefix_caching: bool = True,
        prompt_lookup: bool = True,
        cuda_graphs: bool = True,
        tensor_parallel: int = 1,
    ) -> None:
        if tokenizer_mode not in ("auto", "mistral"):
            raise ConfigError(
                f"tokenizer_mode: {tokenizer_mode!r} is not one of auto, mistral; octavo "
                "tokenises with mistral-common alone"
            )
        # The engine checks its own again; here they are found before the weights are read.
        check_positive(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            tensor_parallel=tensor_parallel,
        )
        if tensor_parallel > 1:
            logger.warning(
                "octavo: tensor_parallel=%d comes later; running on one device", tensor_parallel
            )
        kv_dtype(kv_cache_dtype, torch.float32)  # a wrong name is found before the weights are read
        where = choose_device(device)
        folder = resolve_model(model)
        checkpoint = open_checkpoint(
            folder,
            config_format=config_format,
            load_format=load_format,
            attention_pattern=attention_pattern,
        )
        check_context(max_model_len, checkpoint.config.max_seq_len)
        # Before the weights are read: they are a part of what is shared out.
        if memory is None:
            budget = default_memory(where)
        else:
            budget = parse_bytes(memory, "memory")
            check_budget(budget, where)
        self.tokenizer = Tokenizer.for_model(folder, checkpoint.config, tokenizer)
        with current(where):
            self.model = Transformer.from_checkpoint(checkpoint, dtype, device=where)
        self.engine = Engine(
            self.model,
            self.tokenizer,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            memory=budget,
            kv_cache_dtype=kv_cache_dtype,
            enable_prefix_caching=enable_prefix_caching,
            speculate=prompt_lookup,
            cuda_graphs=cuda_graphs,
        )

    def generate(
        self,
        prompts: str | Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continue plain text.

        Args:
            prompts: one prompt or several. Each is a string, a list of token ids, or a dict with
                `prompt` or `prompt_token_ids`.
            sampling_params: one for all, or one each.
            use_tqdm: show a progress bar on stderr.

        Returns:
            One output a prompt, in their order.

        Raises:
            RequestError: naming what is wrong with a prompt or parameter.
        """
        several = _as_prompts(prompts)
        encoded = [_encode_prompt(self.tokenizer, prompt) for prompt in several]
        texts = [prompt if isinstance(prompt, str) else None for prompt in several]
        return self._run(encoded, texts, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, in the model's instruct template.

        Args:
            messages: a conversation, or a list of them. Its messages are OpenAI's dicts or
                mistral-common's objects.
            sampling_params: one for all, or one each.
            tools: offered to the model in every conversation; its calls are in `.tool_calls`, and
                fit the tools' schemas.
            tool_choice: OpenAI's: `auto`, `none`, `required`, or a dict that names a function.
            parallel_tool_calls: whether an answer may hold several calls.
            use_tqdm: show a progress bar on stderr.

        Returns:
            One output a conversation, in their order.

        Raises:
            RequestError: naming what is wrong with a message or parameter.
        """
        conversations = _as_conversations(messages)
        shown = None if tool_choice == "none" else tools
        encoded = [self.tokenizer.encode_chat(c, shown) for c in conversations]
        params = [
            hold_to_tools(each, self.tokenizer, tools, tool_choice, parallel_tool_calls)
            for each in _one_each(sampling_params, len(encoded))
        ]
        outputs = self._run(encoded, [None] * len(encoded), params, use_tqdm)
        return [self.with_tool_calls(output) for output in outputs]

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Any] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
    ) -> Iterator[RequestOutput]:
        """Answer one conversation; its output after each token, whole up to there.

        Stopping the iteration stops the answer.
        """
        shown = None if tool_choice == "none" else tools
        prompt_ids = self.tokenizer.encode_chat(messages, shown)
        [params] = _one_each(sampling_params, 1)
        params = hold_to_tools(params, self.tokenizer, tools, tool_choice, parallel_tool_calls)
        request_id = self.engine.add_request(prompt_ids, params)
        for output in self.engine.stream(request_id):
            yield self.with_tool_calls(output) if output.finished else output

    def _run(
        self,
        encoded: list[list[int]],
        texts: list[str | None],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        params = _one_each(sampling_params, len(encoded))
        request_ids: list[int] = []
        try:
            for prompt_ids, text, each in zip(encoded, texts, params, strict=True):
                request_ids.append(self.engine.add_request(prompt_ids, each, text))
        except RequestError as error:
            for request_id in request_ids:
                self.engine.abort(request_id)
            if len(encoded) > 1:
                reason = str(error).removeprefix("prompt: ")
                raise RequestError(f"prompt {len(request_ids)}: {reason}") from None
            raise
        outputs = {}
        with tqdm(total=len(request_ids), disable=not use_tqdm, unit="prompt") as bar:
            for output in self.engine.run(request_ids):
                outputs[output.request_id] = output
                bar.update()
        return [outputs[request_id] for request_id in request_ids]

    def with_tool_calls(self, output: RequestOutput) -> RequestOutput:
        """The same output, each answer's `tool_calls` filled from its tokens."""
        for answer in output.outputs:
            _, answer.tool_calls = split_answer(self.tokenizer, answer.token_ids, len(answer.text))
        return output


def _as_prompts(prompts: object) -> list[Any]:
    """One prompt or several, as a list, with what dicts hold in their place.

    A flat list of integers is one prompt of token ids.
    """
    if not isinstance(prompts, Iterable):
        raise RequestError(f"prompts: one prompt or a list of them, not {type(prompts).__name__}")
    several = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
    if several and all(type(token) is int for token in several):
        return [several]
    return [
        prompt.get("prompt_token_ids", prompt.get("prompt")) if isinstance(prompt, dict) else prompt
        for prompt in several
    ]


def _encode_prompt(tokenizer: Tokenizer, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if isinstance(prompt, Sequence) and all(type(token) is int for token in prompt):
        return list(prompt)
    raise RequestError(f"a prompt is a string or a list of token ids, not {type(prompt).__name__}")


def _as_conversations(messages: Sequence[Any]) -> list[Sequence[Any]]:
    if isinstance(messages, (str, dict)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages: a list of messages, not {type(messages).__name__}")
    if messages and isinstance(messages[0], Sequence) and not isinstance(messages[0], str):
        return list(messages)
    return [messages]


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    several: list[Any] = list(params) if isinstance(params, Sequence) else [params]
    for each in several:
        if not isinstance(each, SamplingParams):
            raise RequestError(
                "sampling_params must be a SamplingParams, or a list with one for each prompt, "
                f"not {type(each).__name__}"
            )
    if len(several) != count:
        raise RequestError(f"{len(several)} sampling_params for {count} prompts")
    return several
