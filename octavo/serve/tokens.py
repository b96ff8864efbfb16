"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter

from octavo.serve import responses
from octavo.serve.errors import ERRORS, ApiError
from octavo.serve.messages import template_messages, template_tools
from octavo.serve.requests import DetokenizeRequest, TokenizeRequest
from octavo.serve.service import ServiceDep

router = APIRouter(tags=["Tokens"])


@router.post("/tokenize", responses=ERRORS)
async def tokenize(body: TokenizeRequest, service: ServiceDep) -> responses.Tokens:
    """Token ids of a text, or of a conversation in the model's template."""
    service.check_model(body.model)
    tokenizer = service.tokenizer
    messages, prompt = body.messages, body.prompt

    def encode() -> list[int]:
        if messages is not None:
            return tokenizer.encode_chat(template_messages(messages), template_tools(body.tools))
        return tokenizer.encode(prompt or "", bos=body.add_special_tokens is not False)

    token_ids = await service.tokenize(encode)
    return responses.Tokens(
        count=len(token_ids), max_model_len=service.max_model_len or 0, tokens=token_ids
    )


@router.post("/detokenize", responses=ERRORS)
async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> responses.Text:
    """The text of token ids, control tokens included."""
    service.check_model(body.model)
    tokenizer = service.tokenizer
    for token in body.tokens:
        if token >= tokenizer.vocab_size:
            raise ApiError(
                400,
                f"tokens: {token} is outside the vocabulary of {tokenizer.vocab_size}",
                param="tokens",
            )
    text = await service.tokenize(lambda: tokenizer.decode(body.tokens, special=True))
    return responses.Text(prompt=text)
