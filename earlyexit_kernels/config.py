"""The configuration saved with an early-exit model: the backbone's own config, the heads, and the exit criterion."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from earlyexit_kernels.criteria import Criterion, from_dict

FORMAT_VERSION = 1


class EarlyExitConfig(PretrainedConfig):
    """Configuration of `EarlyExitForSequenceClassification`.

    Args:
        backbone_config: config of the encoder, or its dict; it is copied.
        method: training method, a name of the objectives table or data of `Objective.to_dict`.
        criterion: data of `Criterion.to_dict`, or None for full depth.
        heads: data of `HeadConfig.to_dict`.
        strict: raise on logits without a meaning.
        format_version: of the saved files.

    Raises:
        ValueError: an unknown format version or criterion.
    """

    model_type = "early-exit"
    sub_configs: ClassVar = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar = ["exit_layer", "layers_run", "all_logits"]

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        method: str | dict[str, Any] = "joint",
        criterion: dict[str, Any] | None = None,
        heads: dict[str, Any] | None = None,
        strict: bool = False,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version: this package reads version {FORMAT_VERSION}, the checkpoint has {format_version!r}; "
                "install the release of earlyexit_kernels that wrote it"
            )
        if isinstance(backbone_config, dict):
            data = dict(backbone_config)
            backbone_config = AutoConfig.for_model(data.pop("model_type"), **data)
        from_dict(criterion)
        # transformers resets the attention of nested configs: a shared object would lose its own
        self.backbone_config = copy.deepcopy(backbone_config)
        self.method = method
        self.criterion = criterion
        self.heads = heads or {}
        self.strict = strict
        self.format_version = format_version
        super().__init__(**kwargs)

    def exit_criterion(self) -> Criterion:
        """The criterion, built."""
        return from_dict(self.criterion)


def default_problem_type(num_labels: int) -> str:
    """What transformers takes a model with that many outputs for, where its config doesn't say."""
    return "regression" if num_labels == 1 else "single_label_classification"
