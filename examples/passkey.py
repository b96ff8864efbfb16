"""The model card's passkey detection: `python examples/passkey.py [MODEL]`.

The card asks for 80 GB here, since the whole prompt goes through its model at once. octavo reads it
in chunks, and memory stays at the weights, the ragged cache and one chunk.
"""

import json
import sys
from pathlib import Path

from huggingface_hub import hf_hub_download
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from octavo import Transformer, generate
from octavo.checkpoint import resolve_model

mistral_models_path = resolve_model(sys.argv[1] if len(sys.argv) > 1 else "demo")


def load_passkey_request() -> ChatCompletionRequest:
    passkey_file = mistral_models_path / "passkey_example.json"
    if not passkey_file.is_file():
        passkey_file = Path(
            hf_hub_download(
                repo_id="mistralai/Ministral-8B-Instruct-2410", filename="passkey_example.json"
            )
        )

    with passkey_file.open() as f:
        data = json.load(f)

    message_content = data["messages"][0]["content"]
    return ChatCompletionRequest(messages=[UserMessage(content=message_content)])


tokenizer = MistralTokenizer.from_file(f"{mistral_models_path}/tekken.json")
model = Transformer.from_folder(mistral_models_path, softmax_fp32=False)

completion_request = load_passkey_request()

tokens = tokenizer.encode_chat_completion(completion_request).tokens

out_tokens, _ = generate(
    [tokens],
    model,
    max_tokens=64,
    temperature=0.0,
    eos_id=tokenizer.instruct_tokenizer.tokenizer.eos_id,
)
result = tokenizer.instruct_tokenizer.tokenizer.decode(out_tokens[0])

print(result)  # The pass key is 13005.
