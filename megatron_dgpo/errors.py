"""The one exception that is shown to the user as a sentence instead of a traceback."""


class UsageError(Exception):
    """Bad input: names the setting or the file and line, what was found, and what to do."""
