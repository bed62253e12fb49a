"""One SLURM for all tests of this folder, if it is installed; in CI it must be."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Slurm, missing_programs


@pytest.fixture(scope="session")
def running_slurm():
    if missing := missing_programs():
        reason = f"NO SLURM HERE: {', '.join(missing)} missing; `apt-get install slurm-wlm munge` as root"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # Not pytest's folder: a socket's path has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    found = None
    try:
        found = Slurm(folder)
        yield found
    finally:
        if found:
            found.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def slurm(running_slurm):
    """Without jobs, before and after."""
    yield running_slurm
    running_slurm.cancel_all()
