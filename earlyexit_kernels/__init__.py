"""Early exit for BERT-like sequence classifiers: easy inputs leave early, at any batch size.

Importing the package registers its model with transformers' Auto classes and its attention function with transformers'
attention tables, and does nothing else.
"""

from transformers import AutoConfig, AutoModelForSequenceClassification

from earlyexit_kernels import backbones, criteria, methods, ops
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.core.attention import register_attention
from earlyexit_kernels.core.replay import replay, replay_each
from earlyexit_kernels.errors import (
    AttentionReplacedError,
    BackendUnavailableError,
    InvalidLogitsError,
    MissingHeadsError,
)
from earlyexit_kernels.hf.config import EarlyExitConfig
from earlyexit_kernels.hf.convert import to_early_exit
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.hf.output import EarlyExitOutput
from earlyexit_kernels.hf.predict import ExitPredictions, predict_with_exits
from earlyexit_kernels.hf.training import Phase, phases
from earlyexit_kernels.serving.drift import ExitDrift
from earlyexit_kernels.serving.scorer import Scorer
from earlyexit_kernels.serving.text_pipeline import ExitPipeline
from earlyexit_kernels.tuning.calibrate import calibrate
from earlyexit_kernels.tuning.record import Calibration
from earlyexit_kernels.tuning.sweep import sweep
from earlyexit_kernels.tuning.targets import Latency, MaxDrop, Risk, SpeedUp
from earlyexit_kernels.tuning.traces import collect_trace, load_trace, save_trace
from earlyexit_kernels.types import Answers, ExitTrace

__version__ = "0.1.0"

__all__ = [
    "Answers",
    "AttentionReplacedError",
    "BackendUnavailableError",
    "Calibration",
    "EarlyExitConfig",
    "EarlyExitForSequenceClassification",
    "EarlyExitOutput",
    "ExitDrift",
    "ExitPipeline",
    "ExitPredictions",
    "ExitTrace",
    "InvalidLogitsError",
    "Latency",
    "MaxDrop",
    "MissingHeadsError",
    "Phase",
    "Risk",
    "Scorer",
    "SpeedUp",
    "available_backends",
    "backbones",
    "calibrate",
    "collect_trace",
    "criteria",
    "load_trace",
    "methods",
    "ops",
    "phases",
    "predict_with_exits",
    "replay",
    "replay_each",
    "save_trace",
    "sweep",
    "to_early_exit",
]

register_attention()
AutoConfig.register(EarlyExitConfig.model_type, EarlyExitConfig, exist_ok=True)
AutoModelForSequenceClassification.register(EarlyExitConfig, EarlyExitForSequenceClassification, exist_ok=True)
