"""Fuzzing: whatever a file or setting holds, reading it ends in a value or a UsageError, soon and in little memory.

`@fuzz` above `@given` tries a property with a few examples; MEGATRON_DGPO_FUZZ_EXAMPLES=1000 makes it as many, a test.
"""

import os

from hypothesis import HealthCheck, settings

fuzz = settings(
    max_examples=int(os.environ.get("MEGATRON_DGPO_FUZZ_EXAMPLES", 50)),
    # On a shared machine only a hang is a failure, and pytest's own limit ends it.
    deadline=None,
    # A file is written anew by every example, into the same folder.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    database=None,
    print_blob=True,
)
