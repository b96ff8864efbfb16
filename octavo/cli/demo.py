"""`octavo demo`: the bundled model answers the model card's four kinds of prompt."""

from __future__ import annotations

import time

from rich.console import Console

from octavo.demo.prompts import PROMPTS
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams

SHOWN = 400  # characters of a prompt


def demo() -> None:
    """Load the bundled model and let it answer the model card's four kinds of prompt."""
    console = Console(highlight=False)
    start = time.perf_counter()
    llm = LLM("demo")
    config = llm.model.config
    console.print(
        f"Bundled model: {config.n_parameters():,} parameters, "
        f"{config.attention_pattern.describe(config.max_seq_len)}, "
        f"loaded in {time.perf_counter() - start:.1f} s",
    )
    for prompt in PROMPTS:
        messages = prompt.messages()
        n_tokens = len(llm.tokenizer.encode_chat(messages, prompt.tools))
        start = time.perf_counter()
        output = llm.chat(
            messages, SamplingParams(max_tokens=128, temperature=0), tools=prompt.tools
        )[0]
        seconds = time.perf_counter() - start
        answer = output.outputs[0]
        verdict = "[green]right[/]" if prompt.is_right(answer) else "[red]wrong[/]"
        console.rule(f"{prompt.title} ({verdict}, {n_tokens:,} tokens, {seconds:.2f} s)")
        console.print(f"[bold]Prompt[/]  {_shortened(messages[-1]['content'])}")
        console.print("[bold]Answer[/]  ", end="")
        calls = [f"{call.name}({call.arguments})" for call in answer.tool_calls]
        console.print("; ".join(calls) or answer.text, markup=False)


def _shortened(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    return f"{text[: SHOWN // 2]} […] {text[-SHOWN // 2 :]}"
