"""Reinforcement learning: advantages, credit, losses and the trainer."""

from deeprec.rl.advantages import ADVANTAGES, get_advantage, register
from deeprec.rl.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from deeprec.rl.config import LoRAConfig, LossConfig, OptimizerConfig, RLConfig, StageConfig
from deeprec.rl.distributed import ProcessFailedError, ProcessLostError
from deeprec.rl.interrupt import TrainingInterrupted
from deeprec.rl.lora import add_lora
from deeprec.rl.selection import select_requests
from deeprec.rl.trainer import Trainer
from deeprec.rl.updater import TrainingDiverged

__all__ = [
    "ADVANTAGES",
    "CheckpointError",
    "LoRAConfig",
    "LossConfig",
    "OptimizerConfig",
    "ProcessFailedError",
    "ProcessLostError",
    "RLConfig",
    "StageConfig",
    "Trainer",
    "TrainingDiverged",
    "TrainingInterrupted",
    "add_lora",
    "get_advantage",
    "latest_checkpoint",
    "load_checkpoint",
    "register",
    "select_requests",
]
