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
