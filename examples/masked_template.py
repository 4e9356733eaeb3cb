"""Ask a masked model: a template puts prompt rows around a text and lets the model fill in the word behind them.

    make models && python examples/masked_template.py [--model FOLDER] [--steps 60]

The texts are first sentences of the documentation of Python's standard library, and each module has a word that stands
for it. MiniLM comes without a masked model's head: it is trained beside the prompt and saved with it.
With the defaults (67 CPU seconds) 0.08 of 80 held-out texts get the right one of six words before, and 0.69 after.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from _data import MODULES, documented, split
from transformers import AutoModelForMaskedLM, AutoTokenizer, Trainer, TrainingArguments

import fusedprompt as fp

WORDS = dict(zip(MODULES, ("tree", "number", "log", "mail", "path", "security")))


@torch.no_grad()
def judged(model: fp.PromptModel, batches: list[dict[str, torch.Tensor]], words: torch.Tensor) -> tuple[float, float]:
    """(loss, how many of all texts get the right word, among these `words` (W,) of the vocabulary)."""
    losses, right = list[float](), list[bool]()
    for batch in batches:
        output, asked = model.eval()(**batch), batch["labels"] != -100
        losses.append(float(output.loss))
        right += (words[output.logits[asked][:, words].argmax(-1)] == batch["labels"][asked]).tolist()
    return sum(losses) / len(losses), sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="build/models/all-MiniLM-L6-v2")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    template = fp.Template.parse('[prompt 4] [text] [prompt 4] [anchor "is about"] [mask]').bind(tokenizer)
    rows = [{"text": row["text"], "mask_label": WORDS[row["module"]]} for row in documented()]
    train, held_out = split(rows, 80)
    config = fp.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, modules_to_save=["transform"])
    model = fp.get_prompt_model(AutoModelForMaskedLM.from_pretrained(options.model), config, template=template)
    collate = fp.TemplateCollator(template, tokenizer)
    batches = [collate(held_out[start : start + 16]) for start in range(0, len(held_out), 16)]
    words = torch.tensor(tokenizer.convert_tokens_to_ids([*WORDS.values()]))
    print(batches[0].picture())
    before = judged(model, batches, words)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            logging_steps=20,
            remove_unused_columns=False,  # the collator makes a batch of texts
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model, arguments, collate, train_dataset=train).train()
        model.save_pretrained(folder)
        again = fp.PromptModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(options.model), folder)
    after = judged(model, batches, words)
    for name, (loss, right) in (("before", before), ("after", after)):
        print(f"{name}: held-out loss {loss:.3f}, the right one of {len(WORDS)} words {right:.3f}")
    print(f"reloaded: figures are {'the same' if judged(again, batches, words) == after else 'others'}")


if __name__ == "__main__":
    main()
