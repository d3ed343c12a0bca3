"""Owns the guard: a process that ends a server when the process that started it is gone.

`python guard.py GRACE COMMAND...` starts the command in a new process group and prints its process id. When standard
input ends, which it does however the parent dies, the guard sends SIGTERM, and SIGKILL to the group after GRACE
seconds. When the command ends by itself, the guard kills the rest of the group. Standard library only.
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
    # Reaped only after the group is killed: until then the kernel cannot give its id, the group's, to another process.
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
