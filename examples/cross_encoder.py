"""Score pairs of texts with an early-exit model: `CrossEncoder` of sentence-transformers, and `Scorer`.

Requires sentence-transformers. The weights are untrained, so the scores mean nothing: train the model as in
convert_and_train.py, on pairs and scores.
"""

import torch
from sentence_transformers import CrossEncoder
from transformers import BertForSequenceClassification

import earlyexit_kernels as ee
from earlyexit_kernels.data import toy

torch.manual_seed(0)
config = toy.toy_model(layers=4, hidden=64).config
config.num_labels, config.initializer_range = 1, 0.3  # one score per pair
stock = BertForSequenceClassification(config)

model = ee.to_early_exit(stock, method="joint", pooling="first").eval()
model.set_criterion(ee.criteria.Patience(patience=1, tolerance=1.0))  # two exits in a row whose scores agree
model.save_pretrained("early-exit-reranker")
toy.toy_tokenizer().save_pretrained("early-exit-reranker")

reranker = CrossEncoder("early-exit-reranker")
query = "the music was superb"
documents = ["the music was brilliant", "the plot of the film was dull", "the acting was never funny"]
for found in reranker.rank(query, documents):
    print(f"{found['score']:.3f}  {documents[found['corpus_id']]}")

# a CrossEncoder returns the scores only, a Scorer of its model the exit layers too; it applies the sigmoid if asked to
scorer = ee.Scorer(reranker.model, reranker.tokenizer, function_to_apply="sigmoid")
answers = scorer([(query, document) for document in documents])
for score, layer, document in sorted(
    zip(answers["score"], answers["exit_layer"], documents, strict=True), reverse=True
):
    print(f"{score:.3f}  exit {layer} of {model.depth}  {document}")
