"""The errors that a user of octavo can cause. Each message is one line that says what to do."""


class OctavoError(Exception):
    """Base of every error octavo raises on purpose; its text is meant for the user."""


class ConfigError(OctavoError):
    """A configuration file or option that is missing, malformed or contradicts itself."""


class CheckpointError(OctavoError):
    """Weights that are missing, damaged, of the wrong shape or dtype, or not supported."""


class TokenizerError(OctavoError):
    """A tokenizer that is missing, unreadable, or does not fit the model."""


class RequestError(OctavoError, ValueError):
    """A prompt, message or sampling parameter that cannot be served."""


class QuantizeError(OctavoError):
    """A quantisation that cannot start, go on or be written."""


def in_one_line(error: BaseException) -> str:
    """An error by its class and its text, of many lines the first and the last: compilers say what
    is wrong in the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " … ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; PyTorch and cuBLAS raise a plain RuntimeError, in many words."""
    words = ("not enough memory", "out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
