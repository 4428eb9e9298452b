"""Runs commands of hqq-cpp in children that wait, stopped, until somebody has attached to them.

Everything is imported before, so that the calls which an injector counts are those of the command. One
line of JSON a command on standard input: {"argv": [...], "output": FILE}. It answers with the child's
number, and with its status (that of os.waitpid) once it has ended.
"""

import ctypes
import json
import os
import signal
import sys

from hqq_cpp import _core

# Of prctl(2): any process may trace this one, also where only parents may.
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)


def child(argv: list[str], output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    arguments = [b"hqq-cpp", *map(os.fsencode, argv)]
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)
    code = 70
    try:
        os.kill(os.getpid(), signal.SIGSTOP)
        code = _core.cli_main(arguments)
    finally:
        os._exit(code)


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(order["argv"], order["output"])
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
