"""Turn two FFNs of a BERT into mixtures of experts and train it.

Run: python examples/convert_bert.py [FOLDER]

Without a folder of saved weights the BERT is a small one with random weights. Needs the extra [hf].
"""

from __future__ import annotations

import sys

import torch
import transformers

from dynmoe_tutel import ExpertController
from dynmoe_tutel.convert import aux_loss, convert

STEPS, WORD = 100, 7  # the task: does the text hold this word?

torch.manual_seed(0)
if len(sys.argv) > 1:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=2)
else:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2
    )
    model = transformers.BertForSequenceClassification(config)


def batch(texts: int = 64, words: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random texts, their padding mask, and whether each holds the word."""
    ids, label = torch.randint(8, 64, (texts, words)), torch.arange(texts) % 2
    ids[label == 1, 3] = WORD
    mask = torch.arange(words) < torch.randint(4, words + 1, (texts, 1))  # padding reaches no expert
    return ids.masked_fill(~mask, 0), mask.long(), label


ids, mask, label = batch()
dense = model.eval()(ids, attention_mask=mask).logits
convert(model, layers="last_two", num_experts=4, gate_type={"type": "top_any", "max_expert_num": 8})
difference = (model(ids, attention_mask=mask).logits - dense).abs().max()
print(f"right after conversion the logits differ by at most {difference:.0e}")

optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
controller = ExpertController(model, optimizer, schedule={"every": 40})
for _ in range(STEPS):
    ids, mask, label = batch()
    loss = model.train()(ids, attention_mask=mask, labels=label).loss + aux_loss(model, weight=0.01)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for event in controller.step():
        print(event)
ids, mask, label = batch(500)
right = model.eval()(ids, attention_mask=mask).logits.argmax(1) == label
print(f"accuracy after {STEPS} steps: {right.float().mean():.1%}")
