"""Errors that a user can cause. A message says the value, the cause and the fix."""


class MTBIError(ValueError):
    """Base class: launchers print its message without a traceback and exit with 1."""


class ConfigError(MTBIError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(MTBIError):
    """Input data that cannot be used."""


class ShardError(DataError):
    """A part of a manifest that cannot be used; the other parts may be."""


class CheckpointError(MTBIError):
    """A checkpoint or exported model that cannot be loaded."""
