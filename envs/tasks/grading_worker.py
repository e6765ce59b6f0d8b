"""A process of its own that compares answers with math-verify, for `envs.tasks.grading`.

Run by its path, not with `-m`: it imports nothing of this project, so that it starts fast. It reads requests as JSON
lines `[gold, answer]` from its standard input, and writes a JSON line with the verdict for each. Its first line says
`"ready"`, or why it cannot work. It ends with its input.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import signal
import sys
import time

MEMORY = 2**31  # bytes: a number with too many digits is a MemoryError here, before it is one for the machine


def main(seconds: float, patience: float) -> None:
    """Answers requests until the input ends; dies if one takes `seconds` of processor time, or `patience` of any."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no reply
    try:
        if sys.platform != "win32":
            import resource

            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        from math_verify import parse, verify
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), file=replies, flush=True)
        return
    logging.disable()
    print(json.dumps("ready"), file=replies, flush=True)
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            # The process that asked kills this one in time. Should it be gone itself, this thread of the interpreter's
            # needs neither Python's lock nor the end of a multiplication.
            faulthandler.dump_traceback_later(patience, exit=True, file=nowhere)
            _limit_processor_time(time.process_time() + seconds)
            gold, answer = (parse(f"\\boxed{{{side}}}", parsing_timeout=None) for side in json.loads(line))
            verdict = bool(verify(gold, answer, timeout_seconds=None))
            faulthandler.cancel_dump_traceback_later()
            _limit_processor_time(math.inf)
            print(json.dumps(verdict), file=replies, flush=True)


def _limit_processor_time(seconds: float) -> None:
    """Let the system end this process once it has used so many seconds in all."""
    if sys.platform != "win32":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        soft = resource.RLIM_INFINITY if math.isinf(seconds) else math.ceil(seconds)
        if hard == resource.RLIM_INFINITY or 0 <= soft < hard:
            resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]))
