"""Three implementations of a Mixture-of-Experts block behind one signature, and what they share."""

from ferrum_models.moe.marlin import MarlinExpertWeights
from ferrum_models.moe.plan import (
    BucketPlan,
    FusedConfig,
    build_device_plan,
    build_host_plan,
    pick_fused_config,
    pick_moe_block_size,
)
from ferrum_models.moe.profile import Profile, profile
from ferrum_models.moe.registry import IMPLEMENTATIONS, run_experts
from ferrum_models.moe.streams import CudaLanes, InOrder
from ferrum_models.moe.weights import DenseExpertWeights, ExpertWeights, GptqExpertWeights, Int4ExpertWeights

__all__ = [
    "IMPLEMENTATIONS",
    "BucketPlan",
    "CudaLanes",
    "DenseExpertWeights",
    "ExpertWeights",
    "FusedConfig",
    "GptqExpertWeights",
    "InOrder",
    "Int4ExpertWeights",
    "MarlinExpertWeights",
    "Profile",
    "build_device_plan",
    "build_host_plan",
    "pick_fused_config",
    "pick_moe_block_size",
    "profile",
    "run_experts",
]
