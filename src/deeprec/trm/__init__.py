"""The preference-aware TRM and its training."""

from deeprec.trm import (  # noqa: F401  # each adds its backend to the ops
    packed_cpu,
    packed_cuda,
    packed_reference,
    packed_triton,
)
from deeprec.trm.config import TRMConfig
from deeprec.trm.examples import WrittenPreference
from deeprec.trm.history_states import HistoryStates
from deeprec.trm.model import PreferenceAwareTRM
from deeprec.trm.packed import PackedTRM
from deeprec.trm.phrases import PhraseBook, PhraseEncoder
from deeprec.trm.preferences import PreferenceMix, PreferenceWriter
from deeprec.trm.training import TrainedTRM, TRMTrainConfig, train_trm

__all__ = [
    "HistoryStates",
    "PackedTRM",
    "PhraseBook",
    "PhraseEncoder",
    "PreferenceAwareTRM",
    "PreferenceMix",
    "PreferenceWriter",
    "TRMConfig",
    "TRMTrainConfig",
    "TrainedTRM",
    "WrittenPreference",
    "train_trm",
]
