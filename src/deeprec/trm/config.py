"""What a preference-aware TRM is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TRMConfig:
    """Shape of a :class:`~deeprec.trm.PreferenceAwareTRM` (arXiv 2505.16810, §3.1).

    ``n_items`` counts the catalogue without the padding row 0, ``text_dim`` is the width P of the
    sentence encoder and ``hidden`` the width H of items and users. The defaults are the paper's;
    ``max_length`` is a constant of the model, because the contextual convolution is circular
    over it.
    """

    n_items: int
    text_dim: int
    hidden: int = 128
    inner: int = 512
    n_layers: int = 2
    n_heads: int = 2
    n_experts: int = 8
    max_length: int = 20
    dropout: float = 0.5
    adaptor_dropout: float = 0.2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for name in (
            "n_items",
            "text_dim",
            "hidden",
            "inner",
            "n_layers",
            "n_heads",
            "n_experts",
            "max_length",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"TRMConfig.{name} must be at least 1, got {value}")
        if self.hidden % self.n_heads:
            raise ValueError(
                f"TRMConfig.hidden ({self.hidden}) must be a multiple of n_heads ({self.n_heads})"
            )
        for name in ("dropout", "adaptor_dropout"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"TRMConfig.{name} must be in [0, 1), got {value}")

    @classmethod
    def from_reference(cls, config: Mapping[str, Any]) -> TRMConfig:
        """Translate the option names of the paper's published code.

        Raises ValueError for the options this architecture has no counterpart of: a causal
        encoder, another activation than gelu, an adaptor of several layers; and where one is
        missing.
        """
        if not config.get("bidirectional", True):
            raise ValueError("reference config: bidirectional must be True, got False")
        if config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(
                f"reference config: hidden_act must be 'gelu', got {config['hidden_act']!r}"
            )
        try:
            text_dim, hidden = int(config["plm_size"]), int(config["embedding_size"])
            layers = list(config.get("adaptor_layers", [text_dim, hidden]))
            if layers != [text_dim, hidden]:
                raise ValueError(
                    "reference config: adaptor_layers must be [plm_size, embedding_size] = "
                    f"{[text_dim, hidden]}, got {layers}"
                )
            return cls(
                n_items=int(config["n_items"]),
                text_dim=text_dim,
                hidden=hidden,
                inner=int(config["hidden_size"]),
                n_layers=int(config["n_layers"]),
                n_heads=int(config["n_heads"]),
                n_experts=int(config["n_exps"]),
                max_length=int(config["max_his_len"]),
                dropout=float(config["dropout_prob"]),
                adaptor_dropout=float(config["adaptor_dropout_prob"]),
                layer_norm_eps=float(config["layer_norm_eps"]),
            )
        except KeyError as option:
            raise ValueError(f"reference config: {option} is missing") from None
