"""The exception for user errors."""


class UserError(ValueError):
    """Invalid input. The message is one line that names the setting or file and says how to fix it.

    Example:
        try:
            model = fd.load(address)
        except fd.UserError as error:
            print(f"error: {error}")
    """


class SharedUserError(UserError):
    """A user error raised on all ranks at the same point, after the process group is set up."""
