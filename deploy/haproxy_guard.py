"""Starts HAProxy so that it does not outlive the process that started it, and notices clients that leave.

A program, not a module: ``python -IS haproxy_guard.py HAPROXY ARGUMENT...`` becomes HAProxy, under the same
process id. When the parent goes, however it goes, the kernel sends SIGUSR1: HAProxy stops listening at once
and ends as soon as its streams have. Without that it would go on with an old list of servers.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_INIT = 1

if __name__ == "__main__":
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() == _INIT:  # it went before we asked
        sys.exit("haproxy_guard: nobody is there to serve for")
    # Serve's configuration lets the kernel splice requests through, and HAProxy then does not notice that a
    # client has gone before its answer begins: -dS turns splicing off.
    os.execv(sys.argv[1], [sys.argv[1], "-dS", *sys.argv[2:]])
