"""Load a saved early-exit model and run it in a `pipeline` of transformers. Run convert_and_train.py first."""

from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import earlyexit_kernels as ee  # also registers the model type `early-exit` with transformers

FOLDER = "early-exit-model"  # a folder written by save_pretrained, with its tokenizer
if not Path(FOLDER).is_dir():
    raise SystemExit(f"expected the folder {FOLDER} here: run convert_and_train.py first, or set FOLDER to your model")
SENTENCES = ["The music was superb.", "The plot of the film was dull.", "The acting was really brilliant."]

# without pipeline_class the answers have a label and a score only
classify = pipeline("text-classification", model=FOLDER, pipeline_class=ee.ExitPipeline)
for sentence, answer in zip(SENTENCES, classify(SENTENCES, batch_size=32), strict=True):
    print(f"{sentence:35} {answer['label']} {answer['score']:.3f}, exit layer {answer['exit_layer']}")

model, tokenizer = AutoModelForSequenceClassification.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
print("exit layers", model(**batch).exit_layer.tolist(), "of", model.depth)
print(model.explain())
