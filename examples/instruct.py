"""The model card's instruct following: `python examples/instruct.py [MODEL]`."""

import sys

from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from octavo import Transformer, generate
from octavo.checkpoint import resolve_model

mistral_models_path = resolve_model(sys.argv[1] if len(sys.argv) > 1 else "demo")

tokenizer = MistralTokenizer.from_file(f"{mistral_models_path}/tekken.json")
model = Transformer.from_folder(mistral_models_path)

completion_request = ChatCompletionRequest(
    messages=[UserMessage(content="How often does the letter r occur in Mistral?")]
)

tokens = tokenizer.encode_chat_completion(completion_request).tokens

out_tokens, _ = generate(
    [tokens],
    model,
    max_tokens=64,
    temperature=0.0,
    eos_id=tokenizer.instruct_tokenizer.tokenizer.eos_id,
)
result = tokenizer.instruct_tokenizer.tokenizer.decode(out_tokens[0])

print(result)
