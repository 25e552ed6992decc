"""Error classes of the package. Messages say what was expected, what was given and what to do."""

from __future__ import annotations


class Unsupported(Exception):  # noqa: N818 - not an error of the user
    """What was read cannot be run in the way that was tried; the message says why. It does not leave the package."""


class BackendUnavailableError(RuntimeError):
    """The requested back-end or kind of layers is not available; the message gives the reason and the remedy.

    >>> import earlyexit_kernels as ee
    >>> from earlyexit_kernels.data.toy import toy_model
    >>> model = ee.to_early_exit(toy_model(layers=2, hidden=8))
    >>> model.configure(path="captured")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    BackendUnavailableError: path 'captured' cannot run here: layers are captured on CUDA, the model is on 'cpu'; ...
    """


class AttentionReplacedError(RuntimeError):
    """The backbone does not use the packed attention, so rows of a batch would attend to each other.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> from earlyexit_kernels.data.toy import toy_model
    >>> model = ee.to_early_exit(toy_model(layers=2, hidden=8))
    >>> model.backbone.config._attn_implementation = "sdpa"
    >>> model(torch.tensor([[2, 7, 3]]))  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    AttentionReplacedError: the backbone's attention is 'sdpa'
    """


class InvalidLogitsError(RuntimeError):
    """An exit produced invalid logits (any NaN, more than one +inf, or all -inf) with ``strict=True``.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> from earlyexit_kernels.data.toy import toy_model
    >>> criterion = ee.criteria.Entropy(threshold=0.1)
    >>> model = ee.to_early_exit(toy_model(layers=2, hidden=8), criterion=criterion, strict=True)
    >>> _ = torch.nn.init.constant_(model.heads.out[0].weight, float("nan"))
    >>> model(torch.tensor([[2, 7, 3]]))  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    InvalidLogitsError: exit 1 of 2 produced invalid logits on 1 row
    """


class MissingHeadsError(RuntimeError):
    """A checkpoint lacks weights of the exit heads; they are not initialised at random without consent.

    >>> import tempfile
    >>> import earlyexit_kernels as ee
    >>> from earlyexit_kernels.data.toy import toy_model
    >>> from safetensors.torch import load_file, save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ee.to_early_exit(toy_model(layers=2, hidden=8)).save_pretrained(folder)
    ...     weights = load_file(f"{folder}/model.safetensors")
    ...     del weights["heads.out.0.weight"]
    ...     save_file(weights, f"{folder}/model.safetensors")
    ...     ee.EarlyExitForSequenceClassification.from_pretrained(folder)  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    MissingHeadsError: the checkpoint lacks 1 weight of the heads
    """
