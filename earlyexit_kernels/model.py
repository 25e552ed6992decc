"""The Hugging Face face: a sequence classifier with an exit after every layer, over any supported backbone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from earlyexit_kernels import backends, engine
from earlyexit_kernels.backbones import adapter_of
from earlyexit_kernels.config import EarlyExitConfig
from earlyexit_kernels.criteria import Criterion, FullDepth
from earlyexit_kernels.errors import AttentionReplacedError
from earlyexit_kernels.heads import ExitHeads, HeadConfig
from earlyexit_kernels.inputs import check_inputs
from earlyexit_kernels.loading import check_loaded, corrupt_files
from earlyexit_kernels.objectives import mean_task_loss, objective_of
from earlyexit_kernels.packing import PACKED_ATTENTION, pack
from earlyexit_kernels.types import ExitOutput, ExitTrace

logger = logging.getLogger("earlyexit_kernels")


@dataclass
class EarlyExitOutput(ModelOutput):
    """What the model returns, in request order.

    Attributes:
        loss: scalar; in train mode the method's objective, in eval mode the task loss of `logits`.
        logits: ``[N, C]``, float32 in eval mode whatever the model's dtype; its softmax is the answer.
        exit_layer: ``[N]`` int64, 1-based depth of the answering head.
        layers_run: ``[N]`` int64, layers computed for the row.
        all_logits: ``[N, L, C]`` in train mode or with `output_all_logits=True`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_layer: Tensor | None = None
    layers_run: Tensor | None = None
    all_logits: Tensor | None = None


class EarlyExitForSequenceClassification(PreTrainedModel):
    """A sequence classifier whose rows leave at the exit that is sure of them, at any batch size.

    Built by `to_early_exit`, or by ``AutoModelForSequenceClassification.from_pretrained`` of a saved one.

    Args:
        config: with the backbone's own config inside.
        backbone: the encoder; default: built from the config.
    """

    config_class = EarlyExitConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: EarlyExitConfig, backbone: nn.Module | None = None) -> None:
        super().__init__(config)
        encoder: Any = config.backbone_config
        if encoder is None:
            raise ValueError(
                "the config has no backbone_config, so this is no early-exit checkpoint; load a stock one with "
                "AutoModelForSequenceClassification and give it exits with to_early_exit"
            )
        self.adapter = adapter_of(encoder.model_type)
        if backbone is None:
            backbone = AutoModel.from_config(encoder)
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None
        self.backbone = backbone
        encoder = backbone.config
        config.backbone_config = encoder
        config._attn_implementation = encoder._attn_implementation = PACKED_ATTENTION
        self.depth: int = encoder.num_hidden_layers
        self.heads = ExitHeads(HeadConfig(**config.heads), encoder.hidden_size, config.num_labels, self.depth)
        self.objective = objective_of(config.method)
        self.compaction = "auto"
        self.invalid_rows = 0
        self._backend = "auto"
        self._layer_macs = _layer_macs(encoder)
        self.set_criterion(config.exit_criterion())
        self.post_init()

    @property
    def criterion(self) -> Criterion | None:
        """The exit criterion in force; None is full depth."""
        return None if isinstance(self._criterion, FullDepth) else self._criterion

    def set_criterion(self, criterion: Criterion | None) -> None:
        """Choose who may leave where; it is saved with the model.

        Args:
            criterion: a rule of `earlyexit_kernels.criteria`, or None for full depth.

        Raises:
            TypeError: not a criterion.
            ValueError: the heads lack what it needs, or it has no meaning for this task.
        """
        if criterion is not None and not isinstance(criterion, Criterion):
            raise TypeError(f"criterion: expected one of earlyexit_kernels.criteria or None, got {criterion!r}")
        rule = FullDepth() if criterion is None else criterion
        config: Any = self.config
        problem_type = config.problem_type or default_problem_type(config.num_labels)
        rule.check(depth=self.depth, classes=config.num_labels, problem_type=problem_type, aux=self.heads.aux_names)
        self._criterion = rule
        config.criterion = None if isinstance(rule, FullDepth) else rule.to_dict()

    @property
    def backend(self) -> str:
        """The back-end that runs the ops on this model's device."""
        return backends.resolve(self._backend, self.device.type)

    def set_backend(self, backend: str) -> None:
        """Choose the back-end of the ops: ``"auto"``, ``"torch"``, ``"triton"`` or ``"cpp"``.

        Raises:
            ValueError: an unknown name.
            BackendUnavailableError: it can't run on this model's device.
        """
        backends.resolve(backend, self.device.type)
        self._backend = backend

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Refused: packed rows need the packed attention."""
        raise ValueError(_ATTENTION_IS_FIXED)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, on the backbone, whose config is the one saved; the stock model keeps its embeddings."""
        backbone: Any = self.backbone
        return backbone.resize_token_embeddings(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_all_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> EarlyExitOutput | tuple[Tensor, ...]:
        """Classify a batch. Gradients flow in train mode only.

        Args:
            input_ids: ``[N, S]`` integers.
            attention_mask: ``[N, S]``, nonzero for tokens, holes allowed; default: all are tokens.
            token_type_ids, position_ids: ``[N, S]`` integers; default: as the stock model computes them.
            labels: ``[N]``, or ``[N, C]`` for several labels a row.
            output_all_logits: run every layer on every row and return the logits of every exit; the answers are those
                of the criterion all the same.
            output_hidden_states, output_attentions: refused, since rows leave on the way.
            return_dict: False for a tuple.

        Raises:
            ValueError: input of a wrong shape, dtype, length or padding side.
            InvalidLogitsError: logits without a meaning, in a strict model.
            AttentionReplacedError: somebody set another attention on the backbone.
        """
        if output_hidden_states or output_attentions:
            raise ValueError(
                "output_hidden_states and output_attentions aren't available: rows leave on the way, so there is no "
                "full set to return; call model.backbone for them"
            )
        all_exits = self.training or bool(output_all_logits)
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            result = self._run(input_ids, attention_mask, token_type_ids, position_ids, all_exits)
        logits, loss = result.logits, None
        if self.training:
            assert result.trace is not None
            logits = result.trace.logits[:, -1]
            loss = None if labels is None else self._objective_loss(result.trace, labels)
        elif labels is not None:
            loss = mean_task_loss(logits, labels, self._problem_type())
        output = EarlyExitOutput(
            loss=loss,
            logits=logits,
            exit_layer=result.exit_layer,
            layers_run=result.layers_run,
            all_logits=None if result.trace is None else result.trace.logits,
        )
        return output if return_dict is not False else output.to_tuple()

    @torch.no_grad()
    def trace(self, **batch: Tensor) -> ExitTrace:
        """The outputs of every exit on a batch, from one full-depth pass; `replay` sweeps criteria over it.

        Args:
            batch: as for `forward`; labels are ignored.

        Raises:
            RuntimeError: the model is in train mode, where dropout would colour the trace.
        """
        if self.training:
            raise RuntimeError("trace: expected the model in eval mode, got train mode; call model.eval() first")
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
        unknown = sorted(set(inputs) - set(names))
        if unknown:
            raise ValueError(f"trace: expected inputs among {names}, got {unknown}")
        ids, mask, types, positions = (inputs.get(n) for n in names)
        trace = self._run(ids, mask, types, positions, all_exits=True).trace
        assert trace is not None
        return trace

    def _run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        all_exits: bool,
    ) -> ExitOutput:
        backbone: Any = self.backbone
        if backbone.config._attn_implementation != PACKED_ATTENTION:
            raise AttentionReplacedError(
                f"the backbone's attention is {backbone.config._attn_implementation!r}, expected {PACKED_ATTENTION!r}; "
                "under another one the rows of a batch attend to each other. Convert the model again"
            )
        ids = check_inputs(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            device=self.device,
            longest=self.adapter.longest(backbone.config),
            limits={
                "input_ids": backbone.get_input_embeddings().num_embeddings,
                "token_type_ids": getattr(backbone.config, "type_vocab_size", None),
                "position_ids": backbone.config.max_position_embeddings,
            },
            first_token=self.heads.config.pooling != "mean",
        )
        if ids.shape[0] == 0:
            return self._empty(ids.device, all_exits)
        batch = pack(ids, attention_mask)
        if position_ids is None:
            position_ids = self.adapter.positions(backbone, ids)
        types = torch.zeros_like(ids) if token_type_ids is None else token_type_ids
        hidden = self.adapter.embed(
            backbone, batch.take(ids), batch.take(position_ids.expand(ids.shape)), batch.take(types.expand(ids.shape))
        )
        settings = engine.Settings(
            backend=self._backend,
            compaction=self.compaction,
            all_exits=all_exits,
            strict=bool(self.config.strict),
            layer_macs=self._layer_macs,
        )
        criterion = FullDepth() if self.training else self._criterion
        layers = self.adapter.layers(backbone)
        result = engine.run(hidden, batch, layers, self.heads, criterion, self.config.num_labels, settings)
        self._count_invalid(result.invalid_rows)
        return result

    def _empty(self, device: torch.device, all_exits: bool) -> ExitOutput:
        classes = self.config.num_labels
        exits = torch.zeros(0, dtype=torch.int64, device=device)
        aux = {n: torch.zeros(0, self.depth, device=device) for n in self.heads.aux_names}
        dtype = self.dtype if self.training else torch.float32
        trace = ExitTrace(torch.zeros(0, self.depth, classes, device=device, dtype=dtype), aux)
        logits = torch.zeros(0, classes, device=device)
        return ExitOutput(logits, exits, exits.clone(), (0,) * self.depth, trace if all_exits else None)

    def _objective_loss(self, trace: ExitTrace, labels: Tensor) -> Tensor:
        loss = self.objective(trace, labels, self._problem_type())
        # an output the objective leaves out would be an unused parameter, which DDP refuses
        return loss + sum(0.0 * raw.float().sum() for raw in trace.aux.values())

    def _problem_type(self) -> str:
        return self.config.problem_type or default_problem_type(self.config.num_labels)

    def _count_invalid(self, invalid_rows: tuple[int, ...]) -> None:
        if not any(invalid_rows):
            return
        if self.invalid_rows == 0:
            where = {layer: rows for layer, rows in enumerate(invalid_rows, start=1) if rows}
            logger.warning(
                "logits without a meaning (NaN, several +inf, or all -inf), rows by layer: %s. Such a row never exits "
                "there; model.invalid_rows goes on counting. Use strict=True to raise instead",
                where,
            )
        self.invalid_rows += sum(invalid_rows)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        allow_new_heads: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a saved model, criterion and thresholds included; safetensors files only.

        Args:
            pretrained_model_name_or_path: folder or hub name.
            allow_new_heads: accept a checkpoint that lacks weights, which are then freshly initialised.
            output_loading_info: return ``(model, info)``.
            args, kwargs: as in transformers, but for `attn_implementation` and `use_safetensors=False`, which are
                refused.

        Raises:
            MissingHeadsError: the checkpoint lacks weights.
            ValueError: `attn_implementation` or `use_safetensors=False` was given.
            RuntimeError: a file is corrupt, or a weight has another shape or no place.
        """
        config: Any = kwargs.get("config")
        chosen = kwargs.get("attn_implementation") or getattr(config, "_attn_implementation", None)
        if chosen not in (None, PACKED_ATTENTION):
            raise ValueError(_ATTENTION_IS_FIXED)
        if not kwargs.pop("use_safetensors", True):
            raise ValueError("use_safetensors=False: pickled weights are never read; convert them to safetensors")
        source = pretrained_model_name_or_path
        try:
            model, info = super().from_pretrained(
                source, *args, output_loading_info=True, use_safetensors=True, **kwargs
            )
        except SafetensorError as error:
            raise RuntimeError(f"{corrupt_files(source)} is corrupt or cut short: {error}") from error
        check_loaded(info, source, allow_new_heads=allow_new_heads)
        return (model, info) if output_loading_info else model


_ATTENTION_IS_FIXED = (
    "attn_implementation can't be chosen: an early-exit model packs the rows of a batch, and only its own attention "
    f"({PACKED_ATTENTION!r}) keeps them apart"
)


def default_problem_type(num_labels: int) -> str:
    return "regression" if num_labels == 1 else "single_label_classification"


def _layer_macs(config: Any) -> int:
    width, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return 4 * width * width + 2 * width * inner
