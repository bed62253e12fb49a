"""docs/your_own.md, followed from an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[1]


@pytest.mark.server
def test_the_page_word_by_word(tmp_path):
    make_tiny_model(tmp_path / "model", "qwen2")
    page = (ROOT / "docs" / "your_own.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    # What the blocks marked sh do, which need the network: an installation, and a model.
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env=os.environ | paths,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(blocks) >= 5
    assert (tmp_path / "runs" / "larger" / "hf" / "config.json").is_file()
    assert (tmp_path / "runs" / "larger" / "plot.png").is_file()
    assert "accuracy" in done.stdout
