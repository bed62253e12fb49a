"""A check for test_check_gpu.py: says one line, then does what a bad driver might."""

import os
import signal
import sys
import time

from tools.gpu_checks.line import PASSED, Line


def check(task, how):
    yield Line("before", PASSED, "said at once")
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "error":
        sys.exit(f"no such file: {task.folder}/weights")
    if how == "hang":
        time.sleep(600)
    yield Line("after", PASSED, "")
