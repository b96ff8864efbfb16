"""The command line as a user types it: what it prints, and how it fails."""

from __future__ import annotations

import fcntl
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.cli import chat, options
from octavo.cli.main import COMMANDS, EVALUATIONS, load_command, main
from octavo.cli.stdout import checked_stdout
from octavo.engine.decode_graph import DecodeGraphs
from octavo.engine.step_limits import StepLimits
from octavo.kernels.cpu import library
from tests.checkpoints import small_config, write_mistral

Capsys = pytest.CaptureFixture[str]

OCTAVO = [sys.executable, "-m", "octavo"]


def run(capsys: Capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `octavo ARGUMENTS`, in this process."""
    saved, sys.argv = sys.argv, ["octavo", *map(str, arguments)]
    try:
        main()
        code: Any = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    finally:
        sys.argv = saved
    out, err = capsys.readouterr()
    return int(code), out, err


@pytest.mark.parametrize("has_graphs", [False, True])
def test_serve_captures_a_gpus_graphs_before_it_says_that_it_serves(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch, has_graphs: bool
) -> None:
    """Without a GPU: the engine says that it has graphs, and what it captures is counted."""
    llm = LLM("demo", device="cpu", max_model_len=64)
    if has_graphs:
        llm.engine.decode = DecodeGraphs(llm.model, llm.engine.pool, StepLimits(2, 64, True), False)
    warmed: list[str] = []
    monkeypatch.setattr(llm.engine, "warm_up", lambda: warmed.append("warm"))
    monkeypatch.setattr(options, "load", lambda *_, **__: llm)

    def serve(settings: Any, listener: Any, load: Any, on_ready: Any) -> None:
        listener.close()
        assert load() is llm
        assert len(warmed) == has_graphs
        on_ready()

    monkeypatch.setattr("octavo.serve.server.serve", serve)
    code, out, _ = run(capsys, "serve", "demo", "--port", "0")
    assert code == 0 and ("capturing" in out) == has_graphs and "serving demo" in out


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"),
    ],
    ids=["torch", "cublas", "cpu"],
)
def test_out_of_memory_is_a_line_that_says_what_to_lower(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(options, "load", load)
    code, _, err = run(capsys, "generate", "demo", "-p", "Hello")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("octavo: out of memory;") and "--memory" in err


def fails(capsys: Capsys, *arguments: object) -> str:
    """stderr of a command that must fail in one line and with exit code 2."""
    code, _, err = run(capsys, *arguments)
    assert code == 2 and err.startswith("octavo: ") and err.count("\n") == 1
    return err


def test_inspect_prints_the_cards_table_from_the_config_alone(
    tmp_path: Path, capsys: Capsys
) -> None:
    config = {
        "dim": 4096, "n_layers": 36, "head_dim": 128, "hidden_dim": 12288, "n_heads": 32,
        "n_kv_heads": 8, "vocab_size": 131072, "norm_eps": 1e-5, "rope_theta": 1e8,
        "max_seq_len": 131072, "sliding_window": [None, 32768, 32768, 32768],
    }  # fmt: skip
    (tmp_path / "params.json").write_text(json.dumps(config))
    code, out, _ = run(capsys, "inspect", tmp_path, "--max-model-len", "128k")
    assert code == 0
    rows = {}
    for line in out.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(cells) > 1:
            rows[cells[0]] = cells[1]
    assert rows["Parameters"] == "8,019,808,256"
    assert rows["Layers"] == "36" and rows["KV Heads (GQA)"] == "8"
    assert rows["Vocab Size"] == "131,072" and rows["Context Length"] == "128k"
    assert rows["Attention Pattern"] == "Ragged (128k,32k,32k,32k)"
    assert rows["Weights"] == "16,039,616,512"
    assert rows["KV cache at 131,072 tokens, 9 full layers"] == "4,831,838,208"
    assert rows["KV cache at 131,072 tokens, 27 windowed layers"] == "3,623,878,656"
    # (9 · 131,072 + 27 · 32,768) tokens · 2 · 8 heads · (128 + 2) bytes.
    assert rows["KV cache at 131,072 tokens, in int8"] == "4,293,918,720"
    assert "No weights in this folder" in out


def test_inspect_takes_a_pattern_and_a_length(text_model: Path, capsys: Capsys) -> None:
    code, out, _ = run(
        capsys, "inspect", text_model, "--attention-pattern", "16,full", "--max-model-len", 100
    )
    assert code == 0 and "Ragged (16,512)" in out and "KV cache at 100 tokens, 2 full" in out


def test_inspect_refuses_a_damaged_checkpoint(
    text_model: Path, tmp_path: Path, capsys: Capsys
) -> None:
    for file in text_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "consolidated.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "consolidated.safetensors: truncated" in fails(capsys, "inspect", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["inspect", "MODEL", "--max-model-len", "1m"], "more than the model's context"),
        (["inspect", "MODEL", "--max-model-len", "long"], "--max-model-len: 'long' is not a size"),
        (
            ["inspect", "MODEL", "--attention-pattern", "8,8,8"],
            "--attention-pattern: its 3 entries do",
        ),
        (["inspect", "nowhere/at/all"], "no such folder"),
        (["generate", "MODEL"], "give either a prompt with -p or a JSONL file with -i"),
        (["generate", "MODEL", "-p", "x", "--temperature", "-1"], "temperature must be at least 0"),
        (["generate", "MODEL", "-p", "x", "-o", "out.jsonl"], "--output: is for the answers to"),
        (["generate", "MODEL", "-p", "x", "--dtype", "int3"], "dtype: 'int3' is not one of"),
        (
            ["chat", "MODEL", "--kv-cache-dtype", "int4"],
            "kv_cache_dtype: 'int4' is not one",
        ),
        (["generate", "MODEL", "-i", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["generate", "MODEL", "-p", "x " * 600], "the model's context is 512"),
        (["chat", "MODEL", "--max-model-len", "9999"], "max_model_len 9999 is more than"),
        (["generate", "MODEL", "-p", "x", "--tokenizer", "no.json"], "no.json: no such tokenizer"),
        (["download", "not-a-repo"], "not-a-repo: not a hub id; write owner/name"),
    ],
)
def test_a_users_mistake_is_one_line(
    text_model: Path, capsys: Capsys, arguments: list[str], problem: str
) -> None:
    assert problem in fails(capsys, *[text_model if a == "MODEL" else a for a in arguments])


def test_generate_prints_what_llm_answers(text_model: Path, llm: LLM, capsys: Capsys) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    expected = llm.chat(messages, SamplingParams(max_tokens=9, temperature=0))[0].outputs[0].text
    code, out, _ = run(
        capsys, "generate", text_model, "-p", "Hello", "--max-tokens", 9, "--dtype", "float32"
    )
    assert (code, out) == (0, expected + "\n")


def test_generate_answers_a_file_line_by_line(
    text_model: Path, tmp_path: Path, capsys: Capsys
) -> None:
    records: list[dict[str, Any]] = [
        {"prompt": "Hello", "id": 1},
        {"messages": [{"role": "user", "content": "Hello"}], "id": 2},
        {"messages": [{"role": "assistant", "content": "Hello"}], "id": 3},
        {"prompt": "x " * 600, "id": 4},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
    code, out, err = run(
        capsys, "generate", text_model, "-i", source, "-o", target, "--max-tokens", 9
    )
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in rows] == [1, 2, 3, 4] and out == ""
    assert rows[0]["text"] == rows[1]["text"] and rows[0]["usage"]["completion_tokens"] <= 9
    assert "start with a user message" in rows[2]["error"] and "context is 512" in rows[3]["error"]
    assert code == 2 and "2 of 4 records have an `error`" in err


@pytest.mark.parametrize(
    ("line", "problem"),
    [("{", "line 2 is not JSON"), ("[]", "line 2 must be an object"), ('{"x": 1}', "line 2 must")],
)
def test_a_bad_line_is_named_before_the_model_is_loaded(
    text_model: Path, tmp_path: Path, capsys: Capsys, line: str, problem: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "ok"}\n' + line)
    assert problem in fails(capsys, "generate", text_model, "-i", source)


def test_chat_over_a_pipe_keeps_and_resets_the_conversation(text_model: Path, llm: LLM) -> None:
    def answer(*contents: str) -> str:
        roles = ("user", "assistant") * 2
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        return llm.chat(messages, SamplingParams(max_tokens=6, temperature=0))[0].outputs[0].text

    first = answer("Hello")
    done = subprocess.run(
        [*OCTAVO, "chat", text_model, "--max-tokens", "6", "--dtype", "float32"],
        input="Hello\nMore\n\n/nonsense\n/reset\nHello\n/quit\nnever read\n",
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    expected = [first, answer("Hello", first, "More"), first]
    assert done.stdout == "".join(text + "\n" for text in expected)
    assert "/nonsense: no such command" in done.stderr and "forgotten" in done.stderr
    assert done.returncode == 0


def test_ctrl_c_ends_a_piped_command_without_a_traceback(text_model: Path) -> None:
    process = subprocess.Popen(
        [*OCTAVO, "chat", text_model], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("Hello\n")
    process.stdin.flush()
    process.stdout.read(1)  # it is answering now
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


def test_reader_that_leaves_early_is_no_error(text_model: Path) -> None:
    command = f"{' '.join(OCTAVO)} generate {text_model} -p Hello --max-tokens 300 | head -c 5"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert len(done.stdout.encode()) <= 8 and done.stderr == ""


def test_every_command_explains_itself(capsys: Capsys) -> None:
    for words in (*([name] for name in COMMANDS), *(["eval", name] for name in EVALUATIONS)):
        code, out, _ = run(capsys, *words, "--help")
        assert code == 0 and "Usage" in out
        line = (COMMANDS | EVALUATIONS)[words[-1]]
        assert (load_command(words[-1]).help or "").splitlines()[0] == line
    assert run(capsys, "--version")[1].startswith("octavo ")


@pytest.mark.parametrize(
    "words",
    ["--help", "--version", "serv", "generate --help", "chat --no-such-option", "serve --help"],
)
def test_what_needs_no_model_does_not_wait_for_pytorch(words: str) -> None:
    code = (
        "import sys\n"
        "from octavo.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    assert not {'torch', 'numpy', 'mistral_common'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout or "Usage" in done.stderr) and "AssertionError" not in done.stderr


def test_a_bench_does_not_load_a_tokenizer() -> None:
    code = "import sys, octavo.cli.bench; assert 'mistral_common' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_bench_does_not_load_what_pytorch_compiles_with() -> None:
    """Which takes 150 MB and 2 seconds, and comes with a dispatch mode or the meta device."""
    code = """if True:
        import sys
        from octavo.bench.measure import run_bench
        from octavo.bench.settings import BenchSettings
        from octavo.kernels.cpu.recording import Recording

        replays = []
        replay = Recording.replay
        Recording.replay = lambda self: (replays.append(self), replay(self))
        run_bench(BenchSettings("demo", prompt=4, decode=5, kv="int8"))
        print(len(replays), 'sympy' in sys.modules)
    """
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout
    n_replays, is_loaded = out.split()
    assert is_loaded == "False"
    assert int(n_replays) == (4 if library.load() else 0)  # of three steps, and a check


def test_options_of_the_cards_command_line_are_accepted(text_model: Path, capsys: Capsys) -> None:
    options = [
        "--tokenizer_mode",
        "mistral",
        "--config_format",
        "mistral",
        "--load_format",
        "mistral",
    ]
    code, out, _ = run(capsys, "generate", text_model, "-p", "x", "--max_tokens", 3, *options)
    assert code == 0 and out.endswith("\n")


def test_output_that_cannot_be_written_is_refused(
    text_model: Path, tmp_path: Path, capsys: Capsys
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "ok"}\n')
    target = tmp_path / "no" / "such" / "folder.jsonl"
    assert "cannot be written" in fails(capsys, "generate", text_model, "-i", source, "-o", target)
    link = tmp_path / "link.jsonl"
    link.symlink_to(source)
    assert "is the --input" in fails(capsys, "generate", text_model, "-i", source, "-o", link)
    assert source.read_text() == '{"prompt": "ok"}\n'
    if os.path.exists("/dev/full"):
        code, _, err = run(capsys, "generate", text_model, "-i", source, "-o", "/dev/full")
        assert code == 2 and "No space left" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
@pytest.mark.parametrize("is_closed", [False, True])
@pytest.mark.parametrize(
    "words", ["inspect MODEL", "generate MODEL -p x", "generate MODEL -i FILE", "chat MODEL"]
)
def test_a_full_disk_or_nothing_on_stdout_is_one_line(
    text_model: Path,
    tmp_path: Path,
    capsys: Capsys,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    is_closed: bool,
) -> None:
    source = tmp_path / "in.jsonl"
    # Longer than the buffer, so that nothing of it is left to be flushed.
    source.write_text(json.dumps({"prompt": "ok", "further": "x" * 20_000}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    arguments = [{"MODEL": text_model, "FILE": source}.get(word, word) for word in words.split()]
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", None if is_closed else full)  # as Python has it
        err = fails(capsys, *arguments)
    problem = "is closed;" if is_closed else "cannot be written: No space left on device;"
    assert err.startswith(f"octavo: standard output: {problem}")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
def test_a_full_disk_is_not_named_again_when_python_ends() -> None:
    with open("/dev/full", "w") as full:
        command = [*OCTAVO, "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_stdout_cannot_encode_is_escaped(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    prompts = ["half of a pair: \ud800", "é 😀", "ok"]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    command = ["octavo", "generate", str(text_model), "-i", str(source), "--max-tokens", "3"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as leaving:
        main()
    assert not leaving.value.code
    lines = written.getvalue().decode(encoding).splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == prompts
    assert ("é 😀" in lines[1]) == (encoding == "utf-8")
    with checked_stdout():
        print("é")
    assert written.getvalue().decode(encoding).endswith("é\n" if encoding == "utf-8" else "\\xe9\n")


class Terminal:
    """A command in a terminal of its own, typed at and read as a person would."""

    def __init__(self, *arguments: object) -> None:
        leader, follower = os.openpty()
        self.process = subprocess.Popen(
            [*OCTAVO, *map(str, arguments)], stdin=follower, stdout=follower, stderr=follower,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(follower)
        self.leader = leader
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def shows(self, wanted: Callable[[str], bool], seconds: float = 60) -> bool:
        """Whether what is shown and unread comes to be as wanted in time."""
        deadline = time.monotonic() + seconds
        while not wanted(self.shown):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.leader], [], [], left)[0]:
                return False
            self.shown += os.read(self.leader, 4096).decode(errors="replace")
        return True

    def read_until(self, text: str) -> str:
        """What is shown up to and with `text`; what follows it stays unread."""
        assert self.shows(lambda shown: text in shown), self.shown
        before, self.shown = self.shown.split(text, 1)
        return before + text


def test_ctrl_c_stops_the_answer_and_not_the_program(text_model: Path, tmp_path: Path) -> None:
    write_mistral(tmp_path, small_config(vocab_size=2048, max_seq_len=2**17))
    shutil.copy(text_model / "tekken.json", tmp_path)
    terminal = Terminal("chat", tmp_path, "--dtype", "float32")
    terminal.read_until("> ")
    terminal.type("Hello\n")
    terminal.read_until("Hello\r\n")
    # An answer, and not only the codes by which a terminal is set: it goes on for minutes.
    assert terminal.shows(lambda shown: len(shown) > 100)
    terminal.type("\x03")
    assert "Traceback" not in terminal.read_until("[stopped]\r\n")
    terminal.read_until("> ")
    terminal.type("half a line")
    terminal.read_until("half a line")
    time.sleep(0.3)  # nobody is faster, and CPython misses a signal that precedes its wait,
    terminal.type("\x03")  # at the prompt it only clears the line
    if not terminal.shows(lambda shown: "> " in shown, seconds=10):
        terminal.type("\x03")  # which on a busy machine is later still
    terminal.read_until("> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(30) == 0


def test_ctrl_c_just_after_an_answer_leaves_the_program_at_its_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: Capsys, text_model: Path
) -> None:
    """It is sent between the answer's last line and the prompt, which no test can hit by time."""
    asked: list[list[dict[str, Any]]] = []

    def take_turn(llm: LLM, messages: list[Any], line: str, *rest: Any) -> list[Any]:
        asked.append(messages)
        if line == "two":
            raise KeyboardInterrupt
        return [*messages, line]

    lines = iter(["one", "two", "three", "/quit"])
    monkeypatch.setattr(chat, "_take_turn", take_turn)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, _, error = run(capsys, "chat", text_model, "--dtype", "float32")
    assert (code, "Traceback" in error) == (0, False)
    assert asked == [[], ["one"], ["one"]]
