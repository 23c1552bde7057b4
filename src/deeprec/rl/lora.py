"""Low-rank adapters through PEFT."""

from __future__ import annotations

from torch import nn

from deeprec.rl.config import LoRAConfig

__all__ = ["add_lora"]


def add_lora(policy: nn.Module, config: LoRAConfig) -> nn.Module:
    """``policy`` with trainable adapters, its own weights frozen (Hu et al., arXiv 2106.09685).

    Dropout is off: the trainer's log-probs must equal the engine's. Needs the extra ``peft``.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs PEFT: pip install 'deeprec[peft]'") from error
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.target_modules,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(policy, settings)
