"""What a request gives back; names and shapes are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.tool_calls import ToolCall


@dataclass(frozen=True)
class Logprob:
    """One token's log-probability under the model itself, before temperature and penalties.

    Attributes:
        logprob: natural logarithm.
        rank: 1 is the likeliest token of the step.
        decoded_token: its text, or None where there is no tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One answer.

    Attributes:
        index: which of the request's `n` answers.
        text: without control tokens; the stop string is cut off.
        token_ids: all generated ids, an end-of-sequence token included.
        cumulative_logprob: the sum of the chosen tokens' log-probabilities, if asked for.
        logprobs: per token, the chosen and the likeliest, by token id; None if not asked for.
        finish_reason: `stop`, `length`, or None while the answer is being written.
        stop_reason: the stop string or token id that ended it; None for end of sequence.
        tool_calls: parsed calls, if the answer is made of them (filled by `LLM.chat`).
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)


@dataclass
class RequestOutput:
    """All answers to one prompt.

    Attributes:
        request_id: counts up from 0 within an engine.
        prompt: the text, or None where the prompt was given as tokens or messages.
        prompt_token_ids: as the model saw them.
        outputs: `n` answers, by index.
        prompt_logprobs: per prompt token, None for the first; None if not asked for.
        finished: whether all answers are.
        num_cached_tokens: of the prompt, found in the prefix cache and not computed again.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = True
    num_cached_tokens: int = 0
