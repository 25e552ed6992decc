"""Other runtimes at full depth, from the same weights: ONNX Runtime and OpenVINO, with torch's number of threads.

They come with the extra ``peers``. Each model is exported once to an ONNX file in a temporary folder, with free batch
size and length; both runtimes read it. In int8 the weights of the products are quantised for each column, and their
inputs while they run: by ONNX Runtime's own dynamic quantisation, and for OpenVINO by NNCF.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from benchmarks.end_to_end.models import Subject
from benchmarks.machine import NotMeasuredError, device

NAMES = ("input_ids", "attention_mask")
OPENVINO_PRECISION = {"float32": "f32", "bfloat16": "bf16"}
#: The precision that OpenVINO chooses by itself: bfloat16 where the processor has it.
BY_DEFAULT = "default"
#: As OpenVINO runs unless told otherwise.
DEFAULT = "OpenVINO by default"
Answering: TypeAlias = Callable[[dict[str, Tensor]], tuple[Tensor, None]]


def onnx_runtime(subject: Subject, *, quantized: bool = False) -> Answering:
    """Return the plain model in ONNX Runtime.

    Args:
        subject: the model.
        quantized: to int8.

    Raises:
        NotMeasuredError: it is not installed, or does not compute in the dtype on the CPU.
    """
    _check_installed("onnxruntime", "onnx", "onnxscript")
    if subject.dtype != "float32":
        raise NotMeasuredError("ONNX Runtime computes in float32 on the CPU")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    path = _quantized(subject) if quantized else exported(subject)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    # the first session of a process clears this flag of its thread
    torch.set_flush_denormal(True)

    def answer(batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        return torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in NAMES})[0]), None

    return answer


def openvino(subject: Subject, *, precision: str = "", quantized: bool = False) -> Answering:
    """Return the plain model in OpenVINO.

    Args:
        subject: the model.
        precision: dtype that it computes in, or `BY_DEFAULT`; default: that of the model.
        quantized: weights to int8.

    Raises:
        NotMeasuredError: it is not installed.
    """
    _check_installed("openvino", "onnx", "onnxscript", *(["nncf"] if quantized else []))
    import openvino as ov

    precision = precision or subject.dtype
    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    if precision != BY_DEFAULT:
        settings["INFERENCE_PRECISION_HINT"] = OPENVINO_PRECISION[precision]
    model: Any = ov.Core().read_model(exported(subject))
    if quantized:
        import nncf

        nncf.set_log_level(logging.ERROR)
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    compiled: Any = ov.Core().compile_model(model, "CPU", settings)

    def answer(batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        return torch.from_numpy(compiled({name: batch[name].numpy() for name in NAMES})[0].copy()), None

    return answer


#: Name -> builder; the first two compute in the model's dtype.
RUNTIMES: dict[str, Callable[[Subject], Answering]] = {
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
    "OpenVINO in bfloat16": functools.partial(openvino, precision="bfloat16"),
    "ONNX Runtime in int8": functools.partial(onnx_runtime, quantized=True),
    "OpenVINO in int8": functools.partial(openvino, precision=BY_DEFAULT, quantized=True),
    DEFAULT: functools.partial(openvino, precision=BY_DEFAULT),
}
#: Runtime -> its arithmetic, where that is not the model's dtype.
ARITHMETIC = {
    "OpenVINO in bfloat16": "bfloat16",
    "ONNX Runtime in int8": "int8",
    "OpenVINO in int8": "int8",
    DEFAULT: BY_DEFAULT,
}


def _check_installed(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise NotMeasuredError(f"{', '.join(missing)} not installed; `pip install --no-build-isolation -e .[peers]`")
    if device() != "cpu":
        raise NotMeasuredError("these runtimes are timed on the CPU only")


def _quantized(subject: Subject) -> str:
    """Return the path of the ONNX file with weights in int8, written once."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = Path(exported(subject))
    path = source.with_name("int8.onnx")
    if not path.exists():
        quantize_dynamic(source, path, weight_type=QuantType.QInt8, per_channel=True)
    return str(path)


def exported(subject: Subject) -> str:
    """Return the path of an ONNX file with the plain model's float32 weights, written once."""
    return str(_folder(subject.origin or subject) / "model.onnx")


@functools.cache
def _folder(subject: Subject) -> Path:
    folder = tempfile.TemporaryDirectory(prefix="earlyexit-peers-")
    _FOLDERS.append(folder)  # removed when the process ends
    # one of the two rows is padded: an export from full rows would drop the mask
    ids = torch.randint(1, subject.vocabulary, (2, 16))
    mask = (torch.arange(16) < torch.tensor([[16], [10]])).long()
    free = {0: torch.export.Dim("rows", min=1, max=4096), 1: torch.export.Dim("length", min=2, max=512)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            _Logits(subject.plain),
            (ids, mask),
            str(Path(folder.name) / "model.onnx"),
            input_names=NAMES,
            output_names=("logits",),
            dynamic_shapes=dict.fromkeys(NAMES, free),
            dynamo=True,
            verbose=False,
        )
    return Path(folder.name)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


class _Logits(nn.Module):
    """The plain model with tensors in and out."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.plain(input_ids=input_ids, attention_mask=attention_mask).logits
