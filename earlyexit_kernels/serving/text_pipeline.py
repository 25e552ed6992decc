"""The text classification pipeline of transformers, with the exit layer in its answers."""

from __future__ import annotations

from typing import Any

from transformers import TextClassificationPipeline

from earlyexit_kernels.hf.model import early_exit_model_in


class ExitPipeline(TextClassificationPipeline):
    """The text classification pipeline of transformers, whose answers also have the key ``exit_layer``.

    Pass it as the documented argument `pipeline_class` of `transformers.pipeline`. Everything else is the pipeline's
    own: arguments, batching, label and score, and that it takes any logits for an answer.

    Args:
        arguments: as for `transformers.TextClassificationPipeline`.

    Raises:
        TypeError: the model has no exits.
        RuntimeError: the model is in train mode, at a call.

    Example:

        >>> import earlyexit_kernels as ee
        >>> from earlyexit_kernels.data import toy
        >>> from transformers import pipeline
        >>> criterion = ee.criteria.MaxProbability(threshold=0.4)  # two classes always pass this
        >>> model = ee.to_early_exit(toy.toy_model(layers=2, hidden=8), criterion=criterion).eval()
        >>> classify = pipeline(
        ...     "text-classification", model=model, tokenizer=toy.toy_tokenizer(), pipeline_class=ee.ExitPipeline
        ... )
        >>> [sorted(answer) for answer in classify(["The plot was dull.", "The cast was witty."])]
        [['exit_layer', 'label', 'score'], ['exit_layer', 'label', 'score']]
        >>> classify("The plot was dull.")[0]["exit_layer"]
        1
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if early_exit_model_in(self.model) is None:
            raise TypeError(
                f"ExitPipeline: expected an early-exit model, got a {type(self.model).__name__}; convert and train it, "
                "or leave pipeline_class out"
            )

    def __call__(self, inputs: Any, **parameters: Any) -> Any:
        """Return what the pipeline returns for texts, each answer with the exit layer."""
        if self.model.training:
            raise RuntimeError("ExitPipeline: expected the model in eval mode, got train mode; call model.eval() first")
        return super().__call__(inputs, **parameters)

    def postprocess(self, model_outputs: Any, **parameters: Any) -> Any:
        """Return what the pipeline returns for a row, one answer or a list of them, each with the exit layer."""
        answers = super().postprocess(model_outputs, **parameters)
        layer = {"exit_layer": int(model_outputs["exit_layer"][0])}
        return [answer | layer for answer in answers] if isinstance(answers, list) else answers | layer
