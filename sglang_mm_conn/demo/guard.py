"""Owns the promise that a server never outlives the process that wanted it.

Runs as a process of its own between the two: `python guard.py GRACE COMMAND...`. It starts the command in a new process
group, prints its process id, and ends it when standard input reaches its end, which the kernel brings about however the
parent dies. Then, or when the command ends by itself, whatever is left of the group is killed. Standard library only.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time


def main() -> int:
    grace, command = float(sys.argv[1]), sys.argv[2:]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, preexec_fn=os.setpgrp)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    print(child.pid, flush=True)
    threading.Thread(target=_stop_at_end_of_input, args=(child, grace), daemon=True).start()
    # The leader is reaped last: until then its id, which names the group, cannot be handed out again.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    _kill_group(child.pid)
    status = child.wait()
    print(f"[guard] the server's process ended with status {status}", file=sys.stderr, flush=True)
    return status if status >= 0 else 128 - status


def _stop_at_end_of_input(child: "subprocess.Popen[bytes]", grace: float) -> None:
    while os.read(0, 4096):
        pass
    os.kill(child.pid, signal.SIGTERM)
    os.kill(child.pid, signal.SIGCONT)  # a frozen server must wake up to see it
    time.sleep(grace)
    _kill_group(child.pid)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
