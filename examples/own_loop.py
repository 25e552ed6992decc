"""Write an early-exit loop of your own on `ee.ops`: packed rows leave after each layer, and the rest move together."""

import torch

import earlyexit_kernels as ee

torch.manual_seed(0)
DEPTH, WIDTH, CLASSES = 6, 32, 3
lengths = torch.tensor([3, 7, 4, 5], dtype=torch.int32)
rows = len(lengths)

# any layers that map packed tokens [T, H] to [T, H], given the offsets [B + 1] of the rows
layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]
heads = [torch.nn.Linear(WIDTH, CLASSES) for _ in range(DEPTH)]

hidden = torch.randn(int(lengths.sum()), WIDTH)
offsets = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)])
row_ids = torch.arange(rows, dtype=torch.int32)  # the request row of each live row, -1 once it has left
criterion = ee.criteria.Entropy(threshold=1.05)  # nats; three equally likely classes have 1.0986
state = criterion.new_state(rows, hidden.device, CLASSES)
answers, exit_layer = torch.zeros(rows, CLASSES), torch.zeros(rows, dtype=torch.int64)

with torch.no_grad():
    for layer, (run, head) in enumerate(zip(layers, heads, strict=True), start=1):
        hidden = hidden + torch.tanh(run(hidden))
        call = {"criterion": criterion, "layer": layer, "depth": DEPTH, "pooling": "mean", "row_ids": row_ids}
        into = {"state": state, "answers": answers, "exit_layer": exit_layer}
        counts = ee.ops.exit_step(hidden=hidden, offsets=offsets, weight=head.weight, bias=head.bias, **call, **into)
        live, tokens, _ = counts.tolist()
        if not live:
            break
        row_ids, new_offsets, source = ee.ops.compact(row_ids, offsets)
        moved = hidden.new_empty(tokens, WIDTH)
        ee.ops.gather_rows(hidden, offsets, source[:live], new_offsets[: live + 1], moved)
        hidden, offsets, row_ids = moved, new_offsets[: live + 1], row_ids[:live]
print("labels", answers.argmax(dim=1).tolist(), "exit layers", exit_layer.tolist(), "of", DEPTH)
