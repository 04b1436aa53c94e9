"""Errors that people read: each says what was found, what was expected and what to do."""

# How a command ends, for scripts that decide by it. 1 is any other problem.
USAGE, INPUT, STORAGE, INTERRUPTED = 2, 3, 4, 5


class BorealError(ValueError):
    """Wrong input: a config key, a file, a layout, a checkpoint. The message is shown without a traceback.

    Args:
        message: found, expected, what to do.
        code: the command's exit code, one of the above.
    """

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


class ProblemsError(BorealError):
    """Several problems found in one look; all are listed, so that one edit can mend them all.

    Args:
        where: what was looked at, e.g. a config path.
        problems: one line each.
        code: the command's exit code.
    """

    def __init__(self, where, problems, code=1):
        self.problems = list(problems)
        count = len(self.problems)
        lines = "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(f"{where}: {count} problem{'s' if count != 1 else ''}\n{lines}", code)
