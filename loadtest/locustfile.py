"""Users of a running server: who wait for each answer (ClosedLoop), and who come whatever the answers do (OpenLoop).

    locust -f loadtest/locustfile.py --headless -u 64 -r 64 -t 1m --host localhost:50051 ClosedLoop
    locust -f loadtest/locustfile.py --headless -u 200 -r 200 -t 2m --host localhost:50051 --rate 0.5 OpenLoop

Answers stand under `Check`; those of an overloaded server under `refused`, apart from failures, for to refuse is what
it should do.
"""

import random
import time
from itertools import cycle

from gevent.pool import Group
from grpc.experimental.gevent import init_gevent
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser

from guard.client import SyncClient, check_request
from guard.errors import GuardError, Overloaded
from guard.settings import Settings
from loadtest.workload import texts

TIMEOUT = 10.0  # seconds of a call

init_gevent()  # so that a call that waits lets other users run
_requests = cycle([check_request([("user", text)]) for text in texts(400, Settings().model / "tokenizer.json")])


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]  # locust's hooks carry no types
def _add_options(parser: LocustArgumentParser) -> None:
    parser.add_argument("--rate", type=float, default=1.0, help="OpenLoop: requests a second of each user")


class _Caller(User):
    abstract = True

    def on_start(self) -> None:
        self._client = SyncClient(self.host or "localhost:50051", timeout=TIMEOUT, retries=False)

    def on_stop(self) -> None:
        self._client.close()

    def check(self) -> None:
        """One call, entered into locust's statistics."""
        name, size, failure = "Check", 0, None
        started = time.perf_counter()
        try:
            size = self._client.check(next(_requests)).ByteSize()
        except Overloaded:
            name = "refused"
        except GuardError as error:
            failure = error
        self.environment.events.request.fire(
            request_type="gRPC",
            name=name,
            response_time=(time.perf_counter() - started) * 1000,
            response_length=size,
            exception=failure,
            context={},
        )


class ClosedLoop(_Caller):
    """Asks again as soon as the answer is there."""

    @task
    def ask(self) -> None:
        self.check()


class OpenLoop(_Caller):
    """Asks at random moments, --rate times a second in the mean, without waiting for answers."""

    def on_start(self) -> None:
        super().on_start()
        self._calls = Group()

    def on_stop(self) -> None:
        self._calls.join()
        super().on_stop()

    def wait_time(self) -> float:
        return random.expovariate(self.environment.parsed_options.rate)

    @task
    def ask(self) -> None:
        self._calls.spawn(self.check)
