"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

# Where tests run in several processes (`make test`), more threads would mostly wait for each other.
# PyTorch reads this when it is imported, and so does what tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from openai import OpenAI

from octavo import LLM
from octavo.checkpoint import DEMO
from tests.checkpoints import small_config, write_mistral
from tests.serving import CARD_MODEL, Server
from tests.threads import threads

# Without a GPU, Triton's kernels are run by its interpreter; they ask for it when they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Behind `nohup` or `&` a shell has interrupts ignored, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    with threads(2):
        yield


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a real tokenizer: the bundled one's, 2,048 tokens."""
    folder = tmp_path_factory.mktemp("text-model")
    config = small_config((None, 8, 8, 8), vocab_size=2048, max_seq_len=512)
    write_mistral(folder, config)
    shutil.copy(DEMO / "tekken.json", folder)
    return folder


@pytest.fixture(scope="session")
def llm(text_model: Path) -> LLM:
    """The random model, loaded, in fp32."""
    return LLM(text_model, dtype="float32")


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The bundled model served under the model card's name, in fp32, by the card's line."""
    card = "--tokenizer_mode mistral --config_format mistral --load_format mistral"
    with Server(
        "demo", *card.split(), "--tensor_parallel=2", "--served-model-name", CARD_MODEL,
        "--dtype", "float32", "--max-queue", "2000", "--max-num-seqs", "32",
    ) as running:  # fmt: skip
        yield running
        code, err = running.stop()
        assert code == 0 and "Traceback" not in err, err


@pytest.fixture(scope="session")
def client(server: Server) -> OpenAI:
    """The official client, pointed at it."""
    return server.openai()
