"""What vLLM's processes do as our entry point has them do; without vLLM."""

import subprocess
import sys

_COPY = """
import os, socket
from megatron_dgpo.rollout.plugin import _close_servers_port
listening, pair = socket.create_server(("127.0.0.1", 0)), socket.socketpair()
# Through pipes vLLM's processes learn of each other's end: a copy too many, and they do not.
pipe = os.pipe()

def opened():
    paths = [f"/proc/self/fd/{number}" for number in range(3, 100)]
    return sorted(os.readlink(path) for path in paths if os.path.lexists(path))

before, port = opened(), os.readlink(f"/proc/self/fd/{listening.fileno()}")
_close_servers_port()
assert port in before and opened() == [name for name in before if name != port], (before, opened())
"""


def test_a_copy_closes_the_port_and_leaves_the_rest_as_it_is():
    subprocess.run([sys.executable, "-c", _COPY], check=True, timeout=120)
