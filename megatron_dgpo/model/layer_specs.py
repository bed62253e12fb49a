"""Layers for Megatron-Core: `te` (Transformer Engine) or `portable` (PyTorch only), with the same parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_dgpo.model.compat import moe_submodules, uses_transformer_engine
from megatron_dgpo.model.packed import AttentionPlan, PackedAttentionParams, Run


def block_spec(config: TransformerConfig, layer_spec: str, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of one model chunk and the norm that ends the last of them."""
    if uses_transformer_engine(layer_spec):
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        norm = TENorm
    else:
        layer, norm = _portable_layer(config), RMSNorm
    layers = [layer] * get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _portable_layer(config: TransformerConfig) -> ModuleSpec:
    head_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=NormColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    norm, mlp = _portable_mlp(config)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _portable_mlp(config: TransformerConfig) -> tuple[type, ModuleSpec]:
    """(the norm before it, the MLP or mixture of experts): a dense MLP's norm is part of its first linear layer."""
    if config.num_moe_experts:
        mixture = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts)
        moe_submodules(mixture).router = Float32Router
        return RMSNorm, mixture
    submodules = MLPSubmodules(linear_fc1=NormColumnParallelLinear, linear_fc2=RowParallelLinear)
    return IdentityOp, ModuleSpec(module=MLP, submodules=submodules)


class RMSNorm(torch.nn.Module):
    """x / rms(x) · weight over the last dimension. Replicated; under sequence parallelism its gradient is summed."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


class Float32Router(TopKRouter):
    """Megatron's router; its own product in float32 needs Transformer Engine."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """[..., H] to [..., experts] float32 logits."""
        return F.linear(input.float(), self.weight.float())


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm, then a linear layer whose output columns are split over the tensor-parallel ranks.

    The norm's weight is `layer_norm_weight`, as in Transformer Engine's layer of the same purpose. Under sequence
    parallelism the input is [S / tp, B, H]; the norm runs on it before the gather.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        weight = self.layer_norm_weight
        return super().forward(F.rms_norm(hidden_states, weight.shape, weight, self.eps), *args, **kwargs)


class PackedAttention(torch.nn.Module):
    """Causal attention within each sequence of a pack, in PyTorch, with Megatron's interface: grouped queries, optional
    window, context parallelism.

    Under context parallelism a rank gathers keys and values of all sequences, then answers for its own two chunks of
    each, which on every rank together meet (2·cp + 1) / (2·cp) of a sequence's keys. A window needs all of them, too:
    nothing is saved there.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type, attention_type, **kwargs) -> None:
        super().__init__()
        self.window = config.window_size[0] + 1 if config.window_size else None
        self.scale = kwargs.get("softmax_scale")
        # Megatron adds a term for a learned softmax offset unless this is None.
        self.current_max_attn_logits = None

    def forward(self, query, key, value, attention_mask, packed_seq_params: PackedAttentionParams, **_) -> torch.Tensor:
        """query: [T / cp, heads, D]; key, value: [T / cp, groups, D]. Returns [T / cp, heads·D].

        Collectives: under context parallelism an all-gather of [T, groups, 2·D] over its group forward, and a
        reduce-scatter of the same backward.
        """
        plan = packed_seq_params.attention_plan
        if plan.gathered is not None:
            both = gather_from_sequence_parallel_region(torch.cat([key, value], -1), group=plan.cp_group)
            # Backward adds at most two numbers to each place: their order is no matter, on a GPU either.
            key, value = both.index_select(0, plan.gathered).chunk(2, -1)
        one_call = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
        attend = self._in_one_call if one_call else self._run_by_run
        return attend(query, key, value, plan).flatten(1)

    def _in_one_call(self, query, key, value, plan: AttentionPlan) -> torch.Tensor:
        """By FlashAttention, whose masks are aligned at the end of the keys. Its kernels take half precision alone."""
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(
            query,
            key,
            value,
            plan.cu_queries,
            plan.cu_keys,
            max(plan.queries),
            max(plan.keys),
            scale=self.scale,
            window_size=(-1 if self.window is None else self.window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _run_by_run(self, query, key, value, plan: AttentionPlan) -> torch.Tensor:
        """One product for all would keep a T × T mask; a loop keeps nothing of that kind."""
        queries = query.split([run.pieces * run.queries for run in plan.runs])
        keys, values = (tensor.split([run.pieces * run.keys for run in plan.runs]) for tensor in (key, value))
        return torch.cat([self._run(*parts, plan) for parts in zip(plan.runs, queries, keys, values, strict=True)])

    def _run(self, run: Run, query, key, value, plan: AttentionPlan) -> torch.Tensor:
        """[n·s, heads, D], [n·t, groups, D] -> [n·s, heads, D]; the last query of a piece stands at its last key."""
        mask = plan.mask(run.queries, run.keys, self.window)
        query, key, value = (tensor.unflatten(0, (run.pieces, -1)).transpose(1, 2) for tensor in (query, key, value))
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.transpose(1, 2).flatten(0, 1)
