"""Convert a BERT classifier, train its exits in phases (method DeeBERT), choose a threshold and save the model.

Runs on generated sentences without a network. For real data, replace `tokenizer`, `stock` and the two data sets.
"""

from transformers import Trainer, TrainingArguments, set_seed

import earlyexit_kernels as ee
from earlyexit_kernels.data import toy

set_seed(0)
tokenizer, stock = toy.toy_tokenizer(), toy.toy_model(layers=3, hidden=64)
sentences = toy.write_splits(train_rows=4000, dev_rows=200, test_rows=0)
train, dev = (
    [{**tokenizer(s.text), "labels": s.label} for s in sentences[split] if s.level in (1, 3)]
    for split in ("train", "dev")
)

model = ee.to_early_exit(stock, method="deebert")  # phase 1: encoder and last exit, phase 2: the other exits
arguments = TrainingArguments("training", per_device_train_batch_size=32, save_strategy="no", report_to="none")
for phase in ee.phases(model):
    args = phase.args(arguments, num_train_epochs=1, learning_rate=2e-3, lr_scheduler_type="constant")
    extras = {"callbacks": phase.callbacks(), "optimizers": (phase.optimizer(args, head_lr=3e-3), None)}
    trainer = Trainer(model, args, train_dataset=train, processing_class=tokenizer, **extras)
    trainer.train()
model.eval()

for threshold in (0.0, 0.1, 0.3, 0.5):  # nats; 0 is full depth
    model.set_criterion(ee.criteria.Entropy(threshold=threshold))
    found = ee.predict_with_exits(model, dev, collate_fn=trainer.data_collator)
    accuracy = (found.logits.argmax(axis=1) == found.labels).mean()
    print(f"entropy < {threshold}: accuracy {accuracy:.3f}, mean exit layer {found.exit_layer.mean():.2f}")
model.save_pretrained("early-exit-model")  # the criterion set last is saved too
tokenizer.save_pretrained("early-exit-model")
