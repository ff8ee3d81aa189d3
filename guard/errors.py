"""Everything Guard raises on purpose.

    GuardError
    +-- InputError            the caller's request is wrong
    |   +-- NotFound          it names a policy that is not there
    +-- Cut                   the turn may be shown no further; raised by the client alone
    +-- Unauthenticated       the caller shows no token, or one that is not known
    +-- ConfigError           the operator's files or settings are wrong
    |   +-- PolicyError       a policy file, with every problem found in it
    |   +-- CheckpointError   a model directory
    +-- Unanswered            the request is fine, but gets no answer now
        +-- Loading           the model is not there yet
        +-- Overloaded        the queue is full; says when to come back
        |   +-- RateLimited   this caller asks more often than it may
        +-- Expired           the deadline passed before the model was asked
        +-- Idle              nothing came on a stream for too long
        +-- Draining          the service is stopping
        +-- ModelFailed       the model raised or gave no finite score

A message may name a field, a number or a file. It never holds the text of a conversation.
"""


class GuardError(Exception):
    """Root of the tree; never raised itself."""


class InputError(GuardError):
    """The request cannot be served as it is; `field` is the path to what is wrong with it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class NotFound(InputError):
    """The request names something that does not exist."""


class Cut(GuardError):
    """A turn that is being written may be shown no further.

    `offset` is the character that the violation begins with, at the latest; `shown` are the characters that were shown.
    `verdict` is the message of guard.v1 that says why.
    """

    def __init__(self, offset: int, shown: int, verdict: object) -> None:
        super().__init__(f"cut at character {offset}")
        self.offset = offset
        self.shown = shown
        self.verdict = verdict


class Unauthenticated(GuardError):
    """The service asks for a token, and none that it knows came with the call."""

    def __init__(self, message: str = "a valid API token is needed") -> None:
        super().__init__(message)


class ConfigError(GuardError):
    """A setting or a file of the operator's is wrong."""


class PolicyError(ConfigError):
    """A policy cannot be used; the message has one `file:line:column: path: problem` a line."""


class CheckpointError(ConfigError):
    """A model directory is incomplete, damaged or of an unknown kind."""


class Unanswered(GuardError):
    """No answer now, through no fault of the request."""


class Loading(Unanswered):
    """The service has just started and its model is still being loaded."""

    def __init__(self) -> None:
        super().__init__("the model is being loaded")


class Overloaded(Unanswered):
    """The admission limit is reached; `retry_after` is in seconds."""

    def __init__(self, retry_after: float, message: str = "the queue is full") -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimited(Overloaded):
    """The caller's own limit is reached, whatever room there is for others."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(retry_after, "too many requests from this client")


class Expired(Unanswered):
    """The caller's deadline passed while the request was queued."""

    def __init__(self) -> None:
        super().__init__("the deadline passed before the model was asked")


class Idle(Unanswered):
    """Nothing came on a stream for longer than the service waits."""

    def __init__(self) -> None:
        super().__init__("nothing came for too long")


class Draining(Unanswered):
    """The service finishes what it has and takes nothing new."""

    def __init__(self) -> None:
        super().__init__("the service is stopping")


class ModelFailed(Unanswered):
    """The model could not score a batch; the cause is chained, and goes to the log alone."""
