"""An audit in a process of its own, by the stand-in for a model, that may end itself at any window.

    python -m tests.audit.stopped OUT ROWS WINDOWS

It judges so many rows; after so many windows it is killed, as by `kill -9`. A window is a part.
"""

import os
import signal
import sys
from pathlib import Path

from guard.audit.judge import Judge
from guard.audit.output import open_output
from guard.audit.run import Local, run
from guard.audit.stop import Stop
from guard.engine.moderator import model_thread
from guard.policy.store import PolicyStore
from tests.audit.sources import Listed, many
from tests.causal import CausalModel
from tests.stand_ins import POLICY


def audit(out: Path, rows: int, windows: int | None = None, part_seconds: float = 0.0) -> None:
    thread = model_thread()
    judging = Local(Judge(CausalModel(), PolicyStore([POLICY], "default"), max_batch_tokens=1), thread)
    with open_output(out, {"rows": rows}, judging.schema, part_seconds) as output:
        for number, _ in enumerate(run(Listed(many(rows)), judging, output, Stop()), 1):
            if number == windows:
                os.kill(os.getpid(), signal.SIGKILL)
    thread.shutdown()


if __name__ == "__main__":
    audit(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), part_seconds=0.0 if int(sys.argv[3]) % 2 else 3600)
