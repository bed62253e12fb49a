"""A checkpoint's table of contents: nothing in it is run, and what no writer makes is refused."""

import enum
import os
import pickle
import tracemalloc

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_dgpo.config import Checkpoint
from megatron_dgpo.errors import UsageError
from megatron_dgpo.weights.architectures import read_architecture
from megatron_dgpo.weights.convert import Job, convert
from megatron_dgpo.weights.dcp_metadata import read_metadata
from megatron_dgpo.weights.formats import METADATA
from megatron_dgpo.weights.load import check_weights
from tests.checkpoints import save
from tests.layouts import make_config
from tests.ranks import run_ranks
from tools.bench_convert import generate
from tools.tiny_models import make_tiny_model


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, file) -> None:
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.fixture(scope="module")
def megatron(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1, vocab_size=7)
    convert(Job(generate(folder / "hf", 1, **sizes), folder / "megatron", "megatron"))
    return folder / "megatron"


@pytest.mark.parametrize("place", ["whole", "planner_data", "storage_meta"])
def test_nothing_in_it_is_run(megatron, tmp_path, place):
    table, path = pickle.loads((megatron / METADATA).read_bytes()), tmp_path / METADATA
    setattr(table, place, Runs(tmp_path / "ran"))
    path.write_bytes(pickle.dumps(Runs(tmp_path / "ran") if place == "whole" else table))
    with pytest.raises(UsageError, match=r"\.metadata.*mkdir"):
        check_weights(read_architecture(megatron), tmp_path)
    assert not (tmp_path / "ran").exists()


class WithGetattr(pickle.Pickler):
    """Writes members of enumerations as Python 3.11.0 to 3.11.3 does."""

    def reducer_override(self, item):
        return (getattr, (type(item), item.name)) if isinstance(item, enum.Enum) else NotImplemented


def test_tables_that_name_members_are_read(megatron, tmp_path):
    table, path = pickle.loads((megatron / METADATA).read_bytes()), tmp_path / METADATA
    with path.open("wb") as file:
        WithGetattr(file).dump(table)
    assert b"getattr" in path.read_bytes()
    assert read_metadata(path) == read_metadata(megatron / METADATA)


def class_attribute() -> bytes:
    """getattr(torch.Size, "numel")."""
    return b"\x80\x04cbuiltins\ngetattr\nctorch\nSize\n\x8c\x05numel\x86R."


def changes_a_class() -> bytes:
    """BUILD with (None, {"version": "bad"}) on the class itself, which would change it for everybody."""
    return b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}\x8c\x07version\x8c\x03bads\x86b."


def endless_key() -> bytes:
    """{((((), ()), ((), ())), …): None}, of depth 60: 2^60 tuples to hash."""
    return b"\x80\x04})" + b"2\x86" * 60 + b"Ns."


def huge_memo() -> bytes:
    """Puts its one entry at number 2^31."""
    return b"\x80\x04}r\x00\x00\x00\x80."


def huge_text() -> bytes:
    return b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"a."


@pytest.mark.parametrize(
    "make", [class_attribute, changes_a_class, endless_key, huge_memo, huge_text], ids=lambda make: make.__name__
)
@pytest.mark.timeout(60)
def test_crafted_tables_take_neither_time_nor_memory(tmp_path, make):
    (tmp_path / METADATA).write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=r"\.metadata is damaged"):
            read_metadata(tmp_path / METADATA)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert Metadata.version is None


@pytest.mark.parametrize("name", ["../__0_0.distcp", "/etc/passwd", "..", ""])
def test_files_elsewhere_are_not_read(megatron, tmp_path, name):
    table = pickle.loads((megatron / METADATA).read_bytes())
    next(iter(table.storage_data.values())).relative_path = name
    (tmp_path / METADATA).write_bytes(pickle.dumps(table))
    with pytest.raises(UsageError, match="not one in a file beside it"):
        read_metadata(tmp_path / METADATA)


def test_all_kinds_of_entries_are_read(megatron):
    assert read_metadata(megatron / METADATA) == pickle.loads((megatron / METADATA).read_bytes())


def load_crafted(model_dir, folder):
    """Save a training checkpoint, put `Runs` into its state or table, and load it: what came of each."""
    from megatron_dgpo import checkpoint
    from megatron_dgpo.manifest import Progress
    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.model.policy import Policy

    init_device()
    config = make_config(model_dir)
    initialize_parallel(config.parallel, 1)
    architecture = read_architecture(model_dir)
    policy = Policy(config, architecture, 1)
    # Adam has nothing to save before its first step.
    for group in policy.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    for each in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        each.optimizer.step()
    honest, state = checkpoint._rng_state, {"python": Runs(folder / "ran")}
    path = save(folder, policy, architecture, Progress(step=1), Checkpoint())
    checkpoint.load(path, policy)
    table = pickle.loads((path / METADATA).read_bytes())
    table.storage_meta = Runs(folder / "ran")
    (path / METADATA).write_bytes(pickle.dumps(table))
    checkpoint._rng_state = lambda: honest() | state
    crafted = save(folder, policy, architecture, Progress(step=2), Checkpoint())
    checkpoint._rng_state = honest
    found = []
    for each in (path, crafted):
        try:
            checkpoint.load(each, policy)
        except (UsageError, CheckpointException) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found, (folder / "ran").exists()


def test_training_checkpoint_of_others_runs_nothing(tmp_path):
    model = make_tiny_model(tmp_path / "model", "llama", num_hidden_layers=1)
    ((found, ran),) = run_ranks(load_crafted, 1, model, tmp_path / "run")
    assert not ran
    assert "mkdir" in found[0] and "UsageError" in found[0], found
    assert "mkdir" in found[1], found
