"""The one exception for mistakes that a person can mend, and how a library's error is quoted in it."""


class UserError(Exception):
    """Something the user asked for cannot be done.

    The message is one paragraph: what is wrong, with the value; where; what to do next. The command
    line prints it without a traceback and exits with code 2. It lives in `pipelines` because that is
    the lowest layer; `trainer` and `cluster` raise the same class.
    """


def first_line(error: BaseException) -> str:
    """What a library's exception says, short enough to stand inside a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
