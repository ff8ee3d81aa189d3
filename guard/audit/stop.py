"""How an audit is asked to stop, which it does where nothing is lost by it."""


class Stopped(Exception):
    """The audit was asked to stop."""


class Stop:
    """Asked for by whoever wants to, also in a signal handler; obeyed where it is checked.

    A handler that raises instead, as Python's own for Ctrl-C does, may do so just when a lock is taken, which is then
    never given back: the threads that wait for it would wait for ever.
    """

    def __init__(self) -> None:
        self.is_asked = False

    def ask(self) -> None:
        self.is_asked = True

    def check(self) -> None:
        """Raises Stopped where that was asked for."""
        if self.is_asked:
            raise Stopped
