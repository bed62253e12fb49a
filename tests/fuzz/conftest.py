"""Fuzzing: whatever a file or setting holds, reading it ends in a value or a UsageError, soon and in little memory.

Each property is tried with a few examples; MEGATRON_DGPO_FUZZ_EXAMPLES says how many, a test. Plain `@given` is enough
in this folder: the profile below is loaded for its modules alone.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

EXAMPLES = "MEGATRON_DGPO_FUZZ_EXAMPLES"

settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get(EXAMPLES, 50)),
    # Machines of CI are shared: only a hang is a failure, and pytest's own limit ends it.
    deadline=None,
    # Files are written into a folder of the module's, anew by every example.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    database=None,
    print_blob=True,
)


@pytest.fixture(autouse=True, scope="module")
def fuzz_profile():
    settings.load_profile("fuzz")
    yield
    settings.load_profile("default")
