"""A check that the layers of a backbone keep the rows of a packed batch apart, which an adapter cannot promise."""

from __future__ import annotations

from typing import Any

import torch

from earlyexit_kernels.engine.embedding import request_rows
from earlyexit_kernels.engine.layer_calls import layer_calls
from earlyexit_kernels.engine.packing import PackedBatch
from earlyexit_kernels.engine.view import ModelView

#: Tokens of the two rows of the check.
LENGTHS = (3, 2)
#: Largest difference between results that should be equal, relative to the largest value.
TOLERANCE = 1e-3


@torch.no_grad()
def check_separation(view: ModelView) -> None:
    """Run a layer of each class on two packed rows, and check that one does not depend on the other.

    Args:
        view: of a model in eval mode.

    Raises:
        ValueError: a row depends on the other one, or a layer cannot run; the message names the class of the layer.
    """
    weight: Any = view.backbone.get_input_embeddings().weight
    tokens, width = sum(LENGTHS), view.backbone.config.hidden_size
    hidden = torch.sin(torch.arange(1.0, tokens * width + 1, device=weight.device)).view(1, tokens, width)
    hidden = hidden.to(weight.dtype)
    other = hidden.clone()
    other[:, : LENGTHS[0]] = -2 * hidden[:, : LENGTHS[0]].flip(2)
    offsets = torch.tensor([0, LENGTHS[0], tokens], dtype=torch.int32, device=weight.device)
    row_ids = torch.arange(len(LENGTHS), dtype=torch.int32, device=weight.device)
    batch = PackedBatch(None, offsets, row_ids, LENGTHS, max(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).to(weight.device)
    _check_pooling(view)
    first_of_class = {type(layer): number for number, layer in reversed(list(enumerate(view.layers, start=1)))}
    for kind, number in first_of_class.items():
        layer = view.layers[number - 1]
        try:
            request = request_rows(view, batch, max(LENGTHS), positions)
            found, expected = (layer_calls(batch, x, request).run(number, layer, x) for x in (other, hidden))
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"the adapter of {view.adapter.model_type!r} does not fit: {kind.__name__} cannot run on packed rows: "
                f"{error}"
            ) from error
        last = slice(LENGTHS[0], None)
        if found.shape != hidden.shape or not torch.allclose(
            found[:, last], expected[:, last], rtol=0.0, atol=TOLERANCE * float(expected[:, last].abs().max())
        ):
            raise ValueError(
                f"the adapter of {view.adapter.model_type!r} does not fit: the rows of a batch affect each other in "
                f"{kind.__name__}. Its layers must pass `plan` on to the attention function of transformers; for "
                "layers that do not, give the adapter `rectangle_arguments`"
            )


def _check_pooling(view: ModelView) -> None:
    """Raise ValueError if exits read the first token of causal layers, which sees no other."""
    causal = any(getattr(module, "is_causal", False) is True for module in view.layers[0].modules())
    if causal and view.heads.config.reads == "first":
        raise ValueError(
            f"the adapter of {view.adapter.model_type!r} does not fit: its layers are causal, so that the first token "
            "of a row sees no other, but exits read it; give its StockHead pooling='last'"
        )
