"""A check that the layers of a backbone keep the rows of a packed batch apart, which an adapter cannot promise."""

from __future__ import annotations

from typing import Any

import torch

from earlyexit_kernels.core.calls import layer_calls, request_of
from earlyexit_kernels.core.packing import pack
from earlyexit_kernels.core.view import View

#: Largest difference between results that should be equal, relative to the largest value.
TOLERANCE = 1e-3


@torch.no_grad()
def check_separation(view: View) -> None:
    """Run a layer of each class on a row of three tokens and one of two, and check that the first affects no other.

    Args:
        view: of a model in eval mode.

    Raises:
        ValueError: the second row depends on the first, or a layer cannot run; the message names the layer's class. Or
            exits read the first token of causal layers, which sees no other.
    """
    refused = f"the adapter of {view.adapter.model_type!r} does not fit: "
    causal = any(getattr(module, "is_causal", False) is True for module in view.layers[0].modules())
    if causal and view.heads.config.reads == "first":
        raise ValueError(
            f"{refused}its layers are causal, so that the first token of a row sees no other, but exits read it; give "
            "its StockHead pooling='last'"
        )
    weight: Any = view.backbone.get_input_embeddings().weight
    width, places = view.backbone.config.hidden_size, torch.arange(3, device=weight.device).expand(2, 3)
    batch = pack(places, torch.tensor([[1, 1, 1], [1, 1, 0]], device=weight.device))
    request = request_of(view, batch, 3, batch.take(places)[0])
    hidden = torch.sin(torch.arange(1.0, 5 * width + 1, device=weight.device)).view(1, 5, width).to(weight.dtype)
    other = hidden.clone()
    other[:, :3] = -2 * hidden[:, :3].flip(2)
    first_of_class = {type(layer): number for number, layer in reversed(list(enumerate(view.layers, start=1)))}
    for kind, number in first_of_class.items():
        layer = view.layers[number - 1]
        try:
            found, expected = (layer_calls(batch, x, request).run(number, layer, x) for x in (other, hidden))
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{refused}{kind.__name__} cannot run on packed rows: {error}") from error
        last = expected[:, 3:]
        if found.shape != hidden.shape or not torch.allclose(
            found[:, 3:], last, rtol=0.0, atol=TOLERANCE * float(last.abs().max())
        ):
            raise ValueError(
                f"{refused}the rows of a batch affect each other in {kind.__name__}. Its layers must pass `plan` on to "
                "the attention function of transformers; for layers that do not, give the adapter "
                "`rectangle_arguments`"
            )
