"""What an error of another library says, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of its text; the name of its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
