"""Layers for Megatron-Core: `te` (Transformer Engine) or `portable` (PyTorch only), with the same parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_dgpo.model.compat import moe_submodules, uses_transformer_engine


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
            core_attention=CausalAttention,
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


class CausalAttention(torch.nn.Module):
    """PyTorch's scaled dot-product attention with Megatron's interface: grouped queries, causal, optional window."""

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type, attention_type, **kwargs) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ValueError("the portable layers do not support context parallelism: use model.layer_spec=te")
        self.window = config.window_size[0] + 1 if config.window_size else None
        self.scale = kwargs.get("softmax_scale")
        # Megatron adds a term for a learned softmax offset unless this is None.
        self.current_max_attn_logits = None

    def forward(self, query, key, value, attention_mask, **_) -> torch.Tensor:
        """query: [S, B, heads, D]; key, value: [S, B, groups, D]. Returns [S, B, heads·D]. No collectives."""
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mask = None if self.window is None or query.shape[2] <= self.window else self._window_mask(query)
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.permute(2, 0, 1, 3).flatten(2)

    def _window_mask(self, query: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(query.shape[2], device=query.device)
        distance = positions[:, None] - positions
        return (distance >= 0) & (distance < self.window)
