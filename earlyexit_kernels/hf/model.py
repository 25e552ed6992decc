"""The Hugging Face face: a sequence classifier with an exit after every layer, over any supported backbone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AutoModel, initialization
from transformers.utils import ModelOutput

from earlyexit_kernels.backbones import adapter_of, check_parts
from earlyexit_kernels.criteria import Criterion, FullDepth, check_fits
from earlyexit_kernels.engine import eager, full_depth
from earlyexit_kernels.engine.fixed_depth import FixedDepth
from earlyexit_kernels.engine.inputs import check_inputs, refuse_other_arguments
from earlyexit_kernels.engine.invalid import InvalidRows
from earlyexit_kernels.engine.packing import PACKED_ATTENTION, PackedBatch, check_attention, pack, row_keys
from earlyexit_kernels.engine.replay import replay
from earlyexit_kernels.heads import ExitHeads, HeadConfig, StartsAt
from earlyexit_kernels.hf.checkpoint import Checkpointed
from earlyexit_kernels.hf.config import EarlyExitConfig
from earlyexit_kernels.hf.execution import RuntimeChoices
from earlyexit_kernels.hf.labels import check_labels
from earlyexit_kernels.hf.phase_state import PhasedTraining
from earlyexit_kernels.objectives import mean_task_loss, objective_of
from earlyexit_kernels.types import ExitOutput, ExitTrace

_Inputs: TypeAlias = tuple[Tensor | None, ...]


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


class EarlyExitForSequenceClassification(Checkpointed, PhasedTraining, RuntimeChoices):
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
        check_parts(self.adapter, backbone)
        self.backbone = backbone
        encoder = backbone.config
        config.backbone_config = encoder
        config._attn_implementation = encoder._attn_implementation = PACKED_ATTENTION
        self.depth: int = encoder.num_hidden_layers
        self.heads = ExitHeads(HeadConfig.from_dict(config.heads), encoder.hidden_size, config.num_labels, self.depth)
        self._invalid = InvalidRows()
        self._layer_macs = _layer_macs(encoder)
        self.set_objective(objective_of(config.method))
        self.set_criterion(config.exit_criterion())
        self.post_init()

    @property
    def criterion(self) -> Criterion | None:
        """The exit criterion in force; None is full depth."""
        return None if isinstance(rule := self._criterion, FullDepth) else rule

    @property
    def invalid_rows(self) -> int:
        """Rows met so far with logits without a meaning, once for each exit; after training, reading synchronises."""
        return self._invalid.total()

    def set_criterion(self, criterion: Criterion | None) -> None:
        """Choose who may leave where; it is saved with the model. A forward pass under way keeps the one before.

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
        check_fits(
            rule, depth=self.depth, classes=config.num_labels, problem_type=self.problem_type, aux=self.heads.aux_names
        )
        self._criterion = rule
        config.criterion = None if isinstance(rule, FullDepth) else rule.to_dict()

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
        **others: Any,
    ) -> EarlyExitOutput | tuple[Tensor, ...]:
        """Classify a batch. Gradients flow in train mode only.

        Args:
            input_ids: ``[N, S]`` integers.
            attention_mask: ``[N, S]``, nonzero for tokens, holes allowed; default: all are tokens.
            token_type_ids, position_ids: ``[N, S]`` integers; default: as the stock model computes them.
            labels: ``[N]``, or ``[N, C]`` for several labels a row.
            output_all_logits: run every layer on every row and return the logits of every exit; the answers are those
                of the criterion all the same. Refused under a criterion that skips layers.
            output_hidden_states, output_attentions: refused, since rows leave on the way; default: the config's.
            return_dict: False for a tuple.
            others: further arguments of stock models, None each.

        Raises:
            ValueError: input or labels of a wrong shape, dtype, value, length or padding side.
            TypeError: an argument that isn't supported, `inputs_embeds` for instance.
            InvalidLogitsError: logits without a meaning, in a strict model.
            AttentionReplacedError: somebody set another attention on the backbone.
        """
        config: Any = self.config
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if wanted or (config.output_attentions if output_attentions is None else output_attentions):
            raise ValueError(
                "output_hidden_states and output_attentions aren't available: rows leave on the way, so there is no "
                "full set to return; call model.backbone for them"
            )
        refuse_other_arguments(others)
        if labels is not None and isinstance(input_ids, Tensor):
            labels = check_labels(labels, self.problem_type, input_ids.shape[0], self.config.num_labels)
        # read once: another thread may set a criterion before this pass ends
        inputs, rule = (input_ids, attention_mask, token_type_ids, position_ids), self._criterion
        if self.training:
            trace = self._trace(inputs, self.training_collect(), rule)
            loss = self.training_loss(trace, labels)
            result = self._full_depth(trace, trace.logits[:, -1])
        else:
            result = self._traced_answers(inputs, rule) if output_all_logits else self._answers(inputs, rule)
            loss = None if labels is None else mean_task_loss(result.logits, labels, self.problem_type)
        output = EarlyExitOutput(
            loss=loss,
            logits=result.logits,
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
            ValueError: an unknown input, or the criterion skips layers.
        """
        if self.training:
            raise RuntimeError("trace: expected the model in eval mode, got train mode; call model.eval() first")
        inputs = {k: v for k, v in batch.items() if k != "labels" and v is not None}
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
        unknown = sorted(set(inputs) - set(names))
        if unknown:
            raise ValueError(f"trace: expected inputs among {names}, got {unknown}")
        return self._trace(tuple(inputs.get(n) for n in names), full_depth.Collect(), self._criterion)

    def fixed_depth(self) -> FixedDepth:
        """This model for `torch.compile(fullgraph=True)`, `torch.export` and capture in a CUDA graph.

        It shares the parameters, and answers by the criterion now in force, but every row runs every layer: see
        `earlyexit_kernels.engine.fixed_depth`.

        Raises:
            RuntimeError: the model is in train mode.
            ValueError: the model is strict, which asks for a look at the logits.
        """
        if self.config.strict:
            raise ValueError(
                "fixed_depth: strict=True looks at the logits of every exit, which ends a graph; set "
                "model.config.strict = False"
            )
        return FixedDepth(self.adapter, self.backbone, self.heads, self._criterion, self.config.num_labels)

    @torch.no_grad()
    def _answers(self, inputs: _Inputs, rule: Criterion) -> ExitOutput:
        """Rows leave where the criterion says so."""
        if (
            self.device.type == "cuda"
            and (result := self.from_graph(self._checked(inputs), *inputs[1:], rule=rule)) is not None
        ):
            self._invalid.add(result.invalid_rows, bool(self.config.strict))
            return result
        packed = self._packed(inputs, rule.exit_rule.uses_keys)
        if packed is None:
            return self._full_depth(self._no_rows())
        hidden, batch, keys = packed
        settings = eager.Settings(
            backend=self.backend,
            compaction=self.compaction,
            strict=bool(self.config.strict),
            layer_macs=self._layer_macs,
        )
        layers, classes = self.inference_layers(), self.config.num_labels
        result = eager.run(hidden, batch, layers, self.heads, rule, classes, settings, keys)
        self._invalid.add(result.invalid_rows, bool(self.config.strict))
        return result

    @torch.no_grad()
    def _traced_answers(self, inputs: _Inputs, rule: Criterion) -> ExitOutput:
        """Every layer runs on every row; the answers are the criterion's all the same."""
        trace = self._trace(inputs, full_depth.Collect(), rule)
        answers, exit_layer = replay(trace, rule, problem_type=self.problem_type, backend=self._backend)
        return self._full_depth(trace, answers, exit_layer)

    def _trace(self, inputs: _Inputs, collect: full_depth.Collect, rule: Criterion) -> ExitTrace:
        if not self.training and rule.skip_from is not None:
            raise ValueError(
                f"criterion {rule.name!r} skips layers, which changes all later hidden states: no pass "
                "through all layers holds its answers. Run the model, or choose another criterion (None is full depth) "
                "for the trace"
            )
        packed = self._packed(inputs, self._wants_keys())
        if packed is None:
            return self._no_rows()
        hidden, batch, keys = packed
        layers = self.adapter.layers(self.backbone) if self.training else self.inference_layers()
        trace = full_depth.trace_exits(hidden, batch, layers, self.heads, collect, keys)
        self._invalid.add_pass(trace.logits, bool(self.config.strict), training=self.training)
        return replace(trace, problem_type=self.problem_type)

    def _full_depth(
        self, trace: ExitTrace, answers: Tensor | None = None, exit_layer: Tensor | None = None
    ) -> ExitOutput:
        """What a pass through all layers returns; by default the last exit answers."""
        rows = trace.logits.shape[0]
        depths = torch.full((rows,), self.depth, dtype=torch.int64, device=trace.logits.device)
        answers = trace.logits[:, -1] if answers is None else answers
        return ExitOutput(answers, depths if exit_layer is None else exit_layer, depths.clone(), (), trace)

    def _checked(self, inputs: _Inputs) -> Tensor:
        """The input's ids ``[N, S]`` int64, with everything checked."""
        backbone: Any = self.backbone
        check_attention(backbone.config._attn_implementation)
        if (layers := len(self.adapter.layers(backbone))) != self.depth:
            raise ValueError(
                f"the backbone has {layers} layers, the model exits for {self.depth}; change the layers of the stock "
                "model and its config.num_hidden_layers before to_early_exit"
            )
        embeddings = backbone.get_input_embeddings()
        self.heads.check_beside(embeddings.weight)
        input_ids, attention_mask, token_type_ids, position_ids = inputs
        return check_inputs(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            device=self.device,
            longest=self.adapter.longest(backbone.config),
            limits={
                "input_ids": embeddings.num_embeddings,
                "token_type_ids": getattr(backbone.config, "type_vocab_size", None),
                "position_ids": backbone.config.max_position_embeddings,
            },
        )

    def _packed(self, inputs: _Inputs, with_keys: bool) -> tuple[Tensor, PackedBatch, Tensor | None] | None:
        """Checked, packed and embedded: hidden ``[1, T, H]``, the rows, their keys; None for an empty batch."""
        ids, backbone = self._checked(inputs), self.backbone
        _, attention_mask, token_type_ids, position_ids = inputs
        if ids.shape[0] == 0:
            return None
        batch = pack(ids, attention_mask, first_token=self.heads.config.pooling != "mean")
        if position_ids is None:
            position_ids = self.adapter.positions(backbone, ids)
        types = torch.zeros_like(ids) if token_type_ids is None else token_type_ids
        tokens = batch.take(ids)
        hidden = self.adapter.first_states(
            backbone, tokens, batch.take(position_ids.expand(ids.shape)), batch.take(types.expand(ids.shape))
        )
        return hidden, batch, row_keys(tokens, batch.offsets) if with_keys else None

    def _wants_keys(self) -> bool:
        """Whether a trace keeps the rows' keys: for a rule that draws, in a replay."""
        return not self.training and "halting" in self.heads.aux_names

    def _no_rows(self) -> ExitTrace:
        device, classes = self.device, self.config.num_labels
        names = [n for n in self.heads.aux_names if n != "gate"]
        aux = {n: torch.zeros(0, self.depth, device=device) for n in names}
        dtype = self.dtype if self.training else torch.float32
        keys = torch.zeros(0, dtype=torch.int64, device=device) if self._wants_keys() else None
        logits = torch.zeros(0, self.depth, classes, device=device, dtype=dtype)
        return ExitTrace(logits, aux, keys, problem_type=self.problem_type)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StartsAt):
            initialization.constant_(module.bias, module.first_bias)


def early_exit_model_in(module: nn.Module) -> EarlyExitForSequenceClassification | None:
    """The early-exit model that a module is or wraps, as DistributedDataParallel and PEFT do; None without one."""
    return next((m for m in module.modules() if isinstance(m, EarlyExitForSequenceClassification)), None)


def _layer_macs(config: Any) -> int:
    width, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return 4 * width * width + 2 * width * inner
