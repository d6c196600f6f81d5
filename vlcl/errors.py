"""The one exception for mistakes that a user can fix.

Raise `UserError` with a message that names the key or file, the value, what is allowed, and the next command.
The commands print it without a traceback and exit with code 2. Anything else that escapes is a defect of vlcl.
"""


class UserError(Exception):
    """A mistake in the user's input, or a state of the user's files, with the way out in its message."""


def first_line(error: BaseException) -> str:
    """What an error says, on one line: libraries add pages, or say nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
