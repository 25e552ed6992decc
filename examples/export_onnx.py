"""Export an early-exit model as a fixed-depth ONNX model and run it in ONNX Runtime. Run convert_and_train.py first.

Requires onnx, onnxscript and onnxruntime. Every row runs every layer: the answers and exit layers are those of the
early-exit model, the time is that of full depth.
"""

from pathlib import Path

import onnxruntime
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import earlyexit_kernels  # noqa: F401  registers the model type `early-exit` with transformers

FOLDER, FILE = "early-exit-model", "early-exit.onnx"  # a folder written by save_pretrained, with its tokenizer
if not Path(FOLDER).is_dir():
    raise SystemExit(f"expected the folder {FOLDER} here: run convert_and_train.py first, or set FOLDER to your model")
model, tokenizer = AutoModelForSequenceClassification.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
batch = tokenizer(["The music was superb.", "The plot of the film was dull."], padding=True, return_tensors="pt")

names = ("input_ids", "attention_mask")
free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
fixed = model.fixed_depth()
with torch.no_grad():
    program = torch.export.export(fixed, tuple(batch[name] for name in names), dynamic_shapes=(free, free))
torch.onnx.export(program, f=FILE, input_names=names, output_names=("logits", "exit_layer"), external_data=False)

session = onnxruntime.InferenceSession(FILE)
other = tokenizer(["The acting was really brilliant."] * 3, return_tensors="pt")  # another batch size and length
logits, exit_layer = session.run(None, {name: other[name].numpy() for name in names})
expected = model(**other)
torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=1e-4, atol=1e-4)
print("logits", logits.round(3).tolist(), "exit layers", exit_layer.tolist(), "of", model.depth)
