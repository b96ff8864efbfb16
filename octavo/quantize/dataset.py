"""A dataset of the hub, or of a local folder, through the `datasets` library."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

from octavo.checkpoint.hub import TIMEOUT_S
from octavo.errors import ConfigError, RequestError


def read_dataset(
    dataset_id: str, split: str, seed: int
) -> tuple[int, Iterator[tuple[int, dict[str, Any]]]]:
    """How many rows a split has, and the rows in shuffled order, each with its number, from 0.

    The order is that of `datasets.Dataset.shuffle`. Rows are read one by one, from disk.

    Raises:
        ConfigError: `datasets` is not installed.
        RequestError: no such dataset or split, no network, or neither a column `messages` nor
            `text`.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"--dataset_id {dataset_id}: the package datasets is not installed; "
            "pip install 'octavo[quantize]', or give a JSONL file"
        ) from None
    with _quiet():
        data = _load(dataset_id, split)
        if not isinstance(data, datasets.Dataset):
            raise RequestError(f"{dataset_id}: --dataset_split must be one of {', '.join(data)}")
        # Shuffling the numbers of the rows gives the same order, and rows that errors can name.
        order = datasets.Dataset.from_dict({"row": range(len(data))}).shuffle(seed=seed)["row"]
    if not {"messages", "text"} & set(data.column_names):
        raise RequestError(
            f"{dataset_id}: a dataset needs a column `messages` or `text`; "
            f"this one has {', '.join(data.column_names) or 'none'}"
        )
    return len(data), ((row, _without_nulls(data[row])) for row in order)


def is_local(dataset_id: str) -> bool:
    """Whether it is a folder here, and no hub id."""
    return os.path.isdir(dataset_id)


def _load(dataset_id: str, split: str) -> Any:
    """The `datasets.Dataset`; every failure is one line."""
    import datasets

    unreachable = None if is_local(dataset_id) else _ask_hub(dataset_id)
    was_offline = datasets.config.HF_HUB_OFFLINE
    # Without this it would ask a hub that does not answer six times before it looks in its cache.
    datasets.config.HF_HUB_OFFLINE = was_offline or unreachable is not None
    try:
        return datasets.load_dataset(dataset_id, split=split)
    except Exception as error:  # whatever its readers, the hub's client and the disk raise
        if unreachable is not None and isinstance(error, OSError):
            raise RequestError(
                f"{dataset_id}: not in the local cache, and the hub cannot be reached "
                f"({unreachable}); connect and run the same command again, or give a JSONL file "
                "with --dataset_id"
            ) from None
        raise RequestError(f"{dataset_id}: {_reason(error)}") from None
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline


def _ask_hub(dataset_id: str) -> str | None:
    """None if the hub knows the dataset, or why it cannot be asked.

    Raises:
        RequestError: the hub does not have it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if "/" not in dataset_id:  # `json` would be a reader of datasets', for the files lying here
            raise HFValidationError
        HfApi().dataset_info(dataset_id, timeout=TIMEOUT_S)
    except HFValidationError:
        raise RequestError(
            f"{dataset_id}: no such file or folder, and no hub id either (owner/name)"
        ) from None
    except RepositoryNotFoundError:
        raise RequestError(
            f"{dataset_id}: no such folder, and no such dataset on the hub (or private, or gated: "
            "accept its terms on its page and set HF_TOKEN)"
        ) from None
    except Exception as error:  # the client raises its transport's errors too
        return _reason(error)
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """`datasets` and the hub's client show no progress bars and write no log lines."""
    import datasets
    from huggingface_hub import utils as hub

    level, bars = logging.root.manager.disable, (datasets.utils, hub)
    shown = [module for module in bars if not module.are_progress_bars_disabled()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        for module in shown:
            module.disable_progress_bars()
        try:
            yield
        finally:
            logging.disable(level)
            for module in shown:
                module.enable_progress_bars()


def _reason(error: BaseException) -> str:
    """One line of the error that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def _without_nulls(value: Any) -> Any:
    """Without the nulls by which a table stands for fields that a record lacks."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
