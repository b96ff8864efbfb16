"""`octavo demo`: quantise the bundled model, and let it answer before and after."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

import octavo
from octavo.cli import options
from octavo.cli.quantize import LayerProgress
from octavo.demo.prompts import PROMPTS, DemoPrompt
from octavo.engine.outputs import CompletionOutput
from octavo.engine.sampling_params import SamplingParams

SAMPLES = 128  # calibration texts: a demo should not take long
SHOWN = 400  # characters of a prompt


def demo(device: options.Device = "auto") -> None:
    """Quantise the bundled model; both models answer the model card's four kinds of prompt."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "demo-W8A8"
        with LayerProgress(Console(stderr=True)) as progress:
            report = octavo.quantize(
                "demo",
                num_calibration_samples=SAMPLES,
                output_dir=folder,
                device=device,
                sample_prompt=None,
                on_progress=progress.update,
            )
        models = {
            "before": octavo.LLM("demo", device=device),
            "after": octavo.LLM(folder, device=device),
        }
        config = models["before"].model.config
        console.print(
            f"Bundled model: {config.n_parameters():,} parameters, "
            f"{config.attention_pattern.describe(config.max_seq_len)}. "
            f"Quantised to W8A8 in {report.seconds:.1f} s: "
            f"{decimal(report.bytes_original)} before, {decimal(report.bytes_quantized)} after; "
            f"KL divergence {report.kl:.6f} nats a token, "
            f"perplexity {report.perplexity_original:.2f} before, "
            f"{report.perplexity_quantized:.2f} after."
        )
        for prompt in PROMPTS:
            _show(console, prompt, models)


def _show(console: Console, prompt: DemoPrompt, models: dict[str, octavo.LLM]) -> None:
    """A prompt, and what each model makes of it."""
    messages = prompt.messages()
    tokenizer = models["before"].tokenizer
    n_tokens = len(tokenizer.encode_chat(messages, prompt.tools))
    console.rule(f"{prompt.title} ({n_tokens:,} tokens)")
    console.print(f"[bold]Prompt[/]  {_shortened(messages[-1]['content'])}")
    params = SamplingParams(max_tokens=128, temperature=0)
    for name, llm in models.items():
        started = time.perf_counter()
        answer = llm.chat(messages, params, tools=prompt.tools)[0].outputs[0]
        seconds = time.perf_counter() - started
        verdict = "[green]right[/]" if prompt.is_right(answer) else "[red]wrong[/]"
        console.print(f"[bold]{name.capitalize():6}[/]  ({verdict}, {seconds:.2f} s) ", end="")
        console.print(_text(answer), markup=False)


def _text(answer: CompletionOutput) -> str:
    calls: Sequence[str] = [f"{call.name}({call.arguments})" for call in answer.tool_calls]
    return "; ".join(calls) or answer.text


def _shortened(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    return f"{text[: SHOWN // 2]} […] {text[-SHOWN // 2 :]}"
