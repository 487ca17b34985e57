"""Three implementations of a Mixture-of-Experts block behind one signature, and what they share."""

from ferrum_models.moe.plan import BucketPlan, build_device_plan, build_host_plan, pick_moe_block_size
from ferrum_models.moe.profile import Profile, profile
from ferrum_models.moe.registry import IMPLEMENTATIONS, run_experts
from ferrum_models.moe.weights import DenseExpertWeights, ExpertWeights, GptqExpertWeights, Int4ExpertWeights

__all__ = [
    "IMPLEMENTATIONS",
    "BucketPlan",
    "DenseExpertWeights",
    "ExpertWeights",
    "GptqExpertWeights",
    "Int4ExpertWeights",
    "Profile",
    "build_device_plan",
    "build_host_plan",
    "pick_moe_block_size",
    "profile",
    "run_experts",
]
