"""The model card's offline example: `python examples/chat.py [MODEL]`."""

import sys

from octavo import LLM, SamplingParams

model_name = sys.argv[1] if len(sys.argv) > 1 else "demo"

sampling_params = SamplingParams(max_tokens=8192, temperature=0)
llm = LLM(
    model=model_name, tokenizer_mode="mistral", config_format="mistral", load_format="mistral"
)

prompt = "Do we need to think for 10 seconds to find the answer of 1 + 1?"
messages = [{"role": "user", "content": prompt}]

outputs = llm.chat(messages, sampling_params=sampling_params)
print(outputs[0].outputs[0].text)
