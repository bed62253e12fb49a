"""Megatron-Core models that end in hidden states: the statistics turn those into a loss without storing logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig

from megatron_dgpo.config import Config
from megatron_dgpo.model.compat import uses_transformer_engine
from megatron_dgpo.model.layer_specs import block_spec
from megatron_dgpo.weights.architectures import Architecture
from megatron_dgpo.weights.slices import padded_vocab_size


class HiddenStatesModel(GPTModel):
    """A GPTModel whose last stage returns its final hidden states, [T / cp, 1, H], the same on tensor-parallel ranks.

    Their gradient is a sum over those ranks, of which each may compute its own part.
    """

    def _postprocess(self, hidden_states, *args, **kwargs):
        if not self.post_process:
            return hidden_states
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_states, group=group)
        replicated = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        if replicated.requires_grad:
            # Megatron reduces a contiguous copy of the gradient and returns the original: one that is not
            # contiguous, as packing makes it, would come back unreduced.
            replicated.register_hook(torch.Tensor.contiguous)
        return replicated

    @property
    def head_weight(self) -> torch.nn.Parameter:
        """[V_padded / tp, H], this rank's rows of the language-model head; only on the last stage."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight


def transformer_config(config: Config, architecture: Architecture) -> TransformerConfig:
    """Megatron's description of the model and of the layout it runs in."""
    model, parallel = config.model, config.parallel
    dtype = getattr(torch, model.dtype)
    # No fusion here needs Apex or a compiler. Transformer Engine's weight gradients are `fuse_weight_gradients`.
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        qk_layernorm=architecture.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        window_size=(architecture.sliding_window - 1, 0) if architecture.sliding_window else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.chunks_per_stage if parallel.chunks_per_stage > 1 else None,
        # Batched, the two messages that an interleaved pipeline of two stages exchanges at once could swap places.
        overlap_p2p_comm=parallel.chunks_per_stage > 1,
        batch_p2p_comm=parallel.chunks_per_stage == 1,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        cp_comm_type="p2p",
        recompute_granularity=None if model.recompute == "none" else model.recompute,
        recompute_method="uniform" if model.recompute == "full" else None,
        recompute_num_layers=1 if model.recompute == "full" else None,
        calculate_per_token_loss=True,
        **(_mixture(config, architecture) if architecture.num_experts else {}),
        # Every parameter is loaded: drawing random ones first would only take time.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        # Megatron's own rotation of a pack asks the GPU for its boundaries in every layer.
        apply_rope_fusion=uses_transformer_engine(model.layer_spec),
        persist_layer_norm=False,
    )


def _mixture(config: Config, architecture: Architecture) -> dict:
    """No load-balancing loss: it would pull the policy away from the objective."""
    return dict(
        num_moe_experts=architecture.num_experts,
        moe_ffn_hidden_size=architecture.expert_ffn_hidden_size,
        moe_router_topk=architecture.experts_per_token,
        moe_router_pre_softmax=not architecture.normalized_routing,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        # Which experts a token goes to must not depend on the rounding of bfloat16.
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_permute_fusion=config.model.fusions,
        moe_grouped_gemm=uses_transformer_engine(config.model.layer_spec),
        expert_model_parallel_size=config.parallel.expert,
        expert_tensor_parallel_size=1,
    )


def build_chunks(config: Config, architecture: Architecture) -> list[HiddenStatesModel]:
    """This rank's model chunks, one, or `chunks_per_stage` of an interleaved pipeline; parameters not yet loaded."""
    megatron = transformer_config(config, architecture)
    stages = range(config.parallel.chunks_per_stage) if config.parallel.chunks_per_stage > 1 else (None,)
    chunks = []
    for vp_stage in stages:
        chunk = HiddenStatesModel(
            megatron,
            block_spec(megatron, config.model.layer_spec, vp_stage),
            vocab_size=padded_vocab_size(architecture.vocab_size, config.parallel.tensor),
            max_sequence_length=architecture.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            vp_stage=vp_stage,
        )
        if architecture.rope_scaling:
            chunk.rotary_pos_emb.inv_freq = _llama3_frequencies(
                chunk.rotary_pos_emb.inv_freq, architecture.rope_scaling
            )
        _mark_split_weights(chunk)
        chunks.append(chunk.to(torch.cuda.current_device()))
    return chunks


def fuse_weight_gradients(chunk: torch.nn.Module) -> None:
    """Let Transformer Engine's layers add a weight's gradient to its float32 `main_grad` inside the matrix product.

    Megatron's setting for it is not used: its head layer refuses that without Apex, though nobody calls the layer here.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _mark_split_weights(chunk: torch.nn.Module) -> None:
    """Say which weights are one rank's part: the gradient's norm counts all others on the first rank only.

    Megatron 0.16 says so only for weights that it initialises. It also takes experts for weights that all replicas
    share unless there are several expert-parallel ranks, although tensor-parallel ranks share them too.
    """
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            # A tied head has no weight of its own.
            if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
                dim = 1 if isinstance(module, RowParallelLinear) else 0
                set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def _llama3_frequencies(frequencies: torch.Tensor, scaling: dict) -> torch.Tensor:
    """Llama 3.1's long-context scaling: low frequencies are divided by `factor`, middling ones blended.

    Megatron has the same formula, but only its factor can be set there.
    """
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelengths
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / scaling["factor"] + blend * frequencies
