"""The one exception that users cause, and how an entry point answers it."""


class UserError(ValueError):
    """Bad input. The message is one line that names the setting or file and says what would be right."""


class SharedUserError(UserError):
    """One that every rank finds at the same moment, after they have met."""
