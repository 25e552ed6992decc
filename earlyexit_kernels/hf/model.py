"""A sequence classifier of transformers with an exit after every layer, over any supported backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, initialization

from earlyexit_kernels.backbones import adapter_of, check_parts
from earlyexit_kernels.backbones.base import linear_weights
from earlyexit_kernels.core.attention import PACKED_ATTENTION, attention_of
from earlyexit_kernels.core.fixed_depth import FixedDepth
from earlyexit_kernels.core.inputs import check_batch, check_pass, refuse_other_arguments, refuse_states
from earlyexit_kernels.core.paths import Explanation
from earlyexit_kernels.core.view import Inputs, Settings, View
from earlyexit_kernels.criteria import Criterion, FullDepth, check_fits, supported_backends
from earlyexit_kernels.criteria.base import refused_criterion_message
from earlyexit_kernels.heads import ExitHeads, HeadConfig, LinearWithInitialBias
from earlyexit_kernels.hf.checkpoint import Checkpointed
from earlyexit_kernels.hf.config import EarlyExitConfig
from earlyexit_kernels.hf.labels import check_labels
from earlyexit_kernels.hf.output import EarlyExitOutput
from earlyexit_kernels.hf.runner import Runner, full_depth_output
from earlyexit_kernels.hf.schedule import Schedule
from earlyexit_kernels.hf.truncation import truncated
from earlyexit_kernels.methods import Method, mean_task_loss, method_of
from earlyexit_kernels.types import Answers, ExitTrace, default_problem_type


class EarlyExitForSequenceClassification(Checkpointed):
    """Sequence classifier with an exit after every layer; each row of a batch leaves as soon as the criterion allows.

    Built by `to_early_exit`, or by ``AutoModelForSequenceClassification.from_pretrained`` from a saved one.

    Args:
        config: with the config of the backbone inside.
        backbone: the encoder; default: built from the config.

    Attributes:
        settings: how batches run; see `configure`.
        runner: runs them, and keeps packed weights and captured layers.
        schedule: training method, current phase and the parameters it has frozen.

    Example:

        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> from transformers import BertConfig
        >>> sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
        >>> config = ee.EarlyExitConfig(backbone_config=BertConfig(vocab_size=50, **sizes))
        >>> model = ee.EarlyExitForSequenceClassification(config).eval()
        >>> model.set_criterion(ee.criteria.MaxProbability(threshold=0.4))  # every row of two classes passes this
        >>> output = model(input_ids=torch.tensor([[2, 7, 3], [2, 9, 3]]))
        >>> output.exit_layer.tolist(), tuple(output.logits.shape)
        ([1, 1], (2, 2))
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
                "the config has no backbone_config, so this is not an early-exit checkpoint; load a stock one with "
                "AutoModelForSequenceClassification and convert it with to_early_exit"
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
        config._attn_implementation, encoder._attn_implementation = PACKED_ATTENTION, attention_of(self.adapter)
        self.depth: int = encoder.num_hidden_layers
        self.heads = ExitHeads(HeadConfig.from_dict(config.heads), encoder.hidden_size, config.num_labels, self.depth)
        self.settings, self.runner = Settings(), Runner()
        self._layer_macs = linear_weights(self.adapter.layers(backbone)[0])
        self.schedule = Schedule()
        self.schedule.start(self, method_of(config.method))
        self.set_criterion(config.exit_criterion())
        self.post_init()

    @property
    def problem_type(self) -> str:
        """The task, as in transformers; never None."""
        config: Any = self.config
        return config.problem_type or default_problem_type(config.num_labels)

    @property
    def criterion(self) -> Criterion | None:
        """The current exit criterion; None: full depth."""
        return None if isinstance(rule := self._criterion, FullDepth) else rule

    def set_criterion(self, criterion: Criterion | None) -> None:
        """Choose the exit criterion, which is saved with the model. A forward pass under way keeps the previous one.

        Args:
            criterion: one of `earlyexit_kernels.criteria`, or None for full depth.

        Raises:
            TypeError: not a criterion.
            ValueError: it does not fit the heads or the task.
            BackendUnavailableError: the chosen back-end does not implement it.
        """
        if criterion is not None and not isinstance(criterion, Criterion):
            raise TypeError(refused_criterion_message("criterion", criterion, none_allowed=True))
        rule = FullDepth() if criterion is None else criterion
        config: Any = self.config
        check_fits(
            rule, depth=self.depth, classes=config.num_labels, problem_type=self.problem_type, aux=self.heads.aux_names
        )
        # a requested back-end may not implement the criterion; the device of the model may still change
        if self.settings.backend not in ("auto", *supported_backends(rule.exit_rule.name)):
            _ = self.view(rule).exit_backend
        self._criterion = rule
        config.criterion = None if isinstance(rule, FullDepth) else rule.to_dict()

    @property
    def invalid_rows(self) -> int:
        """Number of rows with invalid logits so far, once for each exit; reading it after training synchronises."""
        return self.runner.invalid.total()

    def configure(
        self,
        *,
        path: str | None = None,
        weights: str | None = None,
        backend: str | None = None,
        compaction: str | None = None,
    ) -> None:
        """Change how batches run in eval mode; training always runs the layers of the family. Not saved.

        A forward pass under way keeps the settings that it began with.

        Args:
            path: ``"eager"``: the layers of transformers. ``"fused"``: the same function, up to rounding, on the CPU,
                for layers of BERT's or ModernBERT's form, from packed copies of the weights, made again after a change
                (see `refresh`). ``"captured"``: the family's on CUDA, each captured in a CUDA graph for batches of a
                size at the second one, and compared with the layer itself. ``"auto"`` (default): fused or captured
                where supported. Autocast and `torch.compile` run the family's.
            weights: of the copies, with ``"fused"``: ``"float32"`` (default), ``"float16"``, ``"bfloat16"`` or
                ``"int8"``. A new path has ``"float32"``.
            backend: of the ops: ``"auto"`` (default), ``"torch"``, ``"triton"`` or ``"cpp"``.
            compaction: when live rows are moved together: ``"auto"`` (default; where it pays), ``"always"`` (at every
                exit) or ``"never"``.

        Raises:
            ValueError: an unknown value, or weights without ``"fused"``. Nothing is changed then.
            BackendUnavailableError: the path or the back-end cannot run here, or the back-end does not implement the
                criterion; the message says why.

        Example:

            >>> import earlyexit_kernels as ee
            >>> from earlyexit_kernels.data.toy import toy_model
            >>> model = ee.to_early_exit(toy_model(layers=2, hidden=8)).eval()
            >>> model.configure(path="eager", backend="torch")
            >>> model.settings.path, model.settings.compaction
            ('eager', 'auto')
        """
        if path is not None and weights is None:
            weights = "float32"
        given = {"path": path, "weights": weights, "backend": backend, "compaction": compaction}
        settings = dataclasses.replace(self.settings, **{k: v for k, v in given.items() if v is not None})
        # by a runner without the packed copies, for which there may be no memory
        Runner().check(self.view(settings=settings))
        if (settings.path, settings.weights) != (self.settings.path, self.settings.weights):
            self.refresh()
        self.settings = settings

    def explain(self) -> Explanation:
        """Return how the model would run a batch now, and why; `print` it. Changes nothing."""
        return self.runner.explain(self.view(), training=self.training)

    def refresh(self) -> None:
        """Drop packed copies of weights and captured layers; the next batches make them again.

        Needed only after a change that is not detected. Before each batch the model compares its modules, their
        attributes, the address of each weight, and of each copied weight the version counter and a few elements. This
        detects optimizer steps, loaded states, and replaced modules and tensors. It does not detect a write to other
        elements through ``weight.data``, a NumPy or DLPack view, or in inference mode.
        """
        self.runner.forget()

    def view(self, criterion: Criterion | None = None, settings: Settings | None = None) -> View:
        """Return what a pass reads, which no later change of the model's settings reaches.

        Args:
            criterion, settings: of the pass; default: the current ones.
        """
        config: Any = self.config
        return View(
            self.adapter,
            self.backbone,
            self.heads,
            self._criterion if criterion is None else criterion,
            config.num_labels,
            self.problem_type,
            bool(config.strict),
            self.settings if settings is None else settings,
            self._layer_macs,
        )

    @property
    def method(self) -> Method:
        """The training method, chosen by `to_early_exit` or `phases`."""
        return self.schedule.method

    def train(self, mode: bool = True) -> Any:
        """Set train or eval mode; train mode drops copies and captures, and keeps frozen modules in eval mode."""
        if mode:
            self.refresh()
        super().train(mode)
        if mode:
            self.schedule.rest()
        return self

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
            token_type_ids, position_ids: ``[N, S]`` integers; default: those of the stock model.
            labels: ``[N]``, or ``[N, C]`` for several labels a row.
            output_all_logits: also return the logits of every exit, for which every layer runs on every row; the
                answers remain those of the criterion. Not supported by a criterion that skips layers.
            output_hidden_states, output_attentions: not supported; default: those of the config.
            return_dict: False returns a tuple.
            others: further arguments of stock models; must be None or False.

        Raises:
            ValueError: input or labels of a wrong shape, dtype, value, length or padding side.
            TypeError: an unsupported argument, such as `inputs_embeds`.
            InvalidLogitsError: invalid logits in a strict model.
            AttentionReplacedError: the attention of the backbone has been changed.
        """
        config: Any = self.config
        refuse_states(config, output_hidden_states, output_attentions)
        refuse_other_arguments(others)
        view = self.view()
        inputs = check_pass(view, Inputs(input_ids, attention_mask, token_type_ids, position_ids))  # type: ignore[arg-type]
        if labels is not None:
            labels = check_labels(labels, view.task, inputs.rows, view.classes)
        if self.training:
            config.calibration = None  # it describes the weights before this step
            trace = self.runner.trace(view, inputs, self.schedule.trace_options(view.task), training=True)
            loss, result = self.schedule.loss(self.heads, trace, labels, view.task), full_depth_output(trace)
        else:
            result = (self.runner.full_depth if output_all_logits else self.runner.run)(view, inputs)
            loss = None if labels is None else mean_task_loss(result.logits, labels, view.task)
        output = EarlyExitOutput(
            loss=loss,
            logits=result.logits,
            exit_layer=result.exit_layer,
            layers_run=result.layers_run,
            all_logits=None if result.trace is None else result.trace.logits,
        )
        return output if return_dict is not False else output.to_tuple()

    def stream(self, **batch: Tensor) -> Iterator[Answers]:
        """Classify a batch in eval mode and yield answers as soon as they are final, in exit order, each row once.

        They are those of `forward`, bit for bit. The call checks the inputs, the iterator runs the layers. A pass under
        way keeps its criterion and may be left at any part; weights must not change before its last part.
        `invalid_rows` counts its rows at its end.

        Args:
            batch: inputs as for `forward`, without labels.

        Raises:
            RuntimeError: the model is in train mode, where no row leaves before the last layer.
            ValueError, InvalidLogitsError: as for `forward`; the latter from the iterator.

        Example:

            >>> import torch
            >>> import earlyexit_kernels as ee
            >>> from earlyexit_kernels.data.toy import toy_model
            >>> model = ee.to_early_exit(toy_model(layers=3, hidden=8)).eval()
            >>> for rows, logits, exit_layer in model.stream(input_ids=torch.tensor([[2, 7, 3], [2, 9, 3]])):
            ...     print(rows.tolist(), tuple(logits.shape), exit_layer.tolist())  # without a criterion: in one part
            [0, 1] (2, 2) [3, 3]
        """
        view = self.view()
        return self.runner.stream(view, check_batch(view, "stream", batch, training=self.training))

    @torch.no_grad()
    def trace(self, **batch: Tensor) -> ExitTrace:
        """Return the outputs of every exit on a batch, from one full-depth pass, for `replay`.

        Args:
            batch: as for `forward`; labels are ignored.

        Raises:
            RuntimeError: the model is in train mode, in which dropout would change the outputs.
            ValueError: an unknown input, or the criterion skips layers.
        """
        view, given = self.view(), {k: v for k, v in batch.items() if k != "labels"}
        return self.runner.trace(view, check_batch(view, "trace", given, training=self.training))

    def fixed_depth(self) -> FixedDepth:
        """Return a module of this model for `torch.compile(fullgraph=True)`, `torch.export` and CUDA graph capture.

        It shares the parameters and answers by the current criterion, but runs every layer on every row; see
        `earlyexit_kernels.core.fixed_depth`.

        Raises:
            RuntimeError: the model is in train mode.
            ValueError: the model is strict, which requires reading the logits.
        """
        if self.config.strict:
            raise ValueError(
                "fixed_depth: strict=True reads the logits of every exit, which ends a graph; set "
                "model.config.strict = False"
            )
        return FixedDepth(self.adapter, self.backbone, self.heads, self._criterion, self.heads.classes)

    def truncate(self, layers: int) -> EarlyExitForSequenceClassification:
        """Return the model of the first `layers` layers, with copies of their weights and of their exits.

        Without a criterion it answers from its last exit, as this model does under ``FixedLayer(layer=layers)``: with
        the same bits where the layers run on the vector kernels of the CPU. It saves, loads and trains as any other.

        Raises:
            ValueError: not a number of layers of this model, or one with which the groups of an ALBERT would be others.

        Example:

            >>> import earlyexit_kernels as ee
            >>> from transformers import BertConfig
            >>> sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
            >>> config = ee.EarlyExitConfig(backbone_config=BertConfig(vocab_size=50, **sizes))
            >>> ee.EarlyExitForSequenceClassification(config).truncate(2).depth
            2
        """
        return truncated(self, layers)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the embeddings of the backbone, as in transformers; those of the stock model keep their size."""
        return self.backbone.resize_token_embeddings(*args, **kwargs)  # type: ignore[operator]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LinearWithInitialBias):
            initialization.constant_(module.bias, module.initial_bias)


def early_exit_model_in(module: nn.Module) -> EarlyExitForSequenceClassification | None:
    """Return the early-exit model that a module is or wraps, as DistributedDataParallel and PEFT do, or None."""
    return next((m for m in module.modules() if isinstance(m, EarlyExitForSequenceClassification)), None)
