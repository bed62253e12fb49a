"""The portable layers have Transformer Engine's parameter names, in the model and in its checkpoints."""

import pytest

from tests.layouts import LAYOUTS, make_config
from tests.ranks import run_ranks
from tools.tiny_models import FAMILIES, make_tiny_model


def names(model_dir, parallel):
    """(parameters, tensors of the sharded state, parameters that Megatron takes for split) by global name."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.gpt import build_chunks
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.weights.architectures import read_architecture
    from megatron_dgpo.weights.load import named_shards

    init_device()
    config, architecture = make_config(model_dir, parallel), read_architecture(model_dir)
    initialize_parallel(config.parallel, 1)
    chunks = build_chunks(config, architecture)
    # A factory stands for the gate and up halves of a shard, which are stored apart.
    tensors = (ShardedTensor, ShardedTensorFactory)
    stored = {v.key for c in chunks for v in nested_values(c.sharded_state_dict()) if isinstance(v, tensors)}
    split = {n for n, p in named_shards(chunks) if getattr(p, "tensor_model_parallel", False)}
    return {n for n, _ in named_shards(chunks)}, stored, split, architecture.parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_splits_are_the_table_s(tmp_path, family):
    world_size, parallel = LAYOUTS["tp2"]
    model_dir = make_tiny_model(tmp_path, family, num_hidden_layers=2)
    for parameters, stored, split, table in run_ranks(names, world_size, model_dir, parallel):
        assert parameters == set(table)
        # Megatron stores all layers' tensors of a kind as one.
        assert stored == {".".join(part for part in name.split(".") if not part.isdigit()) for name in table}
        assert split == {name for name, (how, *_) in table.items() if how != "copy"}
