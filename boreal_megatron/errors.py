"""Errors that people read: each says what was found, what was expected and what to do."""


class BorealError(ValueError):
    """Wrong input: a config key, a file, a layout, a checkpoint. The message is shown without a traceback."""


class ProblemsError(BorealError):
    """Several problems found in one look; all are listed, so that one edit can mend them all.

    Args:
        where: what was looked at, e.g. a config path.
        problems: one line each.
    """

    def __init__(self, where, problems):
        self.problems = list(problems)
        count = len(self.problems)
        lines = "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(f"{where}: {count} problem{'s' if count != 1 else ''}\n{lines}")
