"""CPT: a context of a few examples, trained by Trainer with a collator of its own, then scored label by label.

python context.py MODEL OUTPUT
"""

import sys

import torch
from peft import CPTConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

model_id, output = sys.argv[1:3]
set_seed(5)
tokenizer = AutoTokenizer.from_pretrained(model_id, padding_side="right")


def encode(text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def coded(number):
    parts = [(1, "the city"), (2, f"w{number} paris"), (3, "is big"), (4, ("no", "yes")[number % 2])]
    ids, kinds = [], []
    for kind, text in parts:
        ids, kinds = ids + encode(text), kinds + [kind] * len(encode(text))
    return {"input_ids": [*ids, tokenizer.eos_token_id], "input_type_mask": [*kinds, 0]}


context = [coded(n) for n in range(4)]
context_ids, context_kinds = [], []
for n, one in enumerate(context):
    context_ids += one["input_ids"]
    context_kinds += [kind + 4 * n if kind else 0 for kind in one["input_type_mask"]]
config = CPTConfig(
    task_type=TaskType.CAUSAL_LM,
    cpt_token_ids=context_ids,
    cpt_mask=[1] * len(context_ids),
    cpt_tokens_type_mask=context_kinds,
    opt_weighted_loss_type="decay",
    opt_loss_decay_factor=0.95,
    opt_projection_epsilon=0.2,
    opt_projection_format_epsilon=0.1,
    tokenizer_name_or_path=model_id,
)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_id), config)


def collate(examples):
    longest = max(len(one["input_ids"]) for one in examples)

    def padded(name):
        return torch.tensor([one[name] + [0] * (longest - len(one[name])) for one in examples])

    ids = padded("input_ids")
    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "input_type_mask": padded("input_type_mask"),
        "labels": ids.clone(),
    }


training_args = TrainingArguments(
    output_dir=output,
    use_cpu=True,
    learning_rate=1e-2,
    logging_steps=2,
    per_device_train_batch_size=4,
    remove_unused_columns=False,
    num_train_epochs=2,
    save_strategy="no",
    report_to="none",
)
trainer = Trainer(
    model=model, args=training_args, train_dataset=[coded(n) for n in range(4, 24)], data_collator=collate
)
trainer.train()
for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"RESULT {entry['loss']:.4f}")

model.eval()
answers = torch.tensor([encode(word)[0] for word in ("no", "yes")])
right = 0
for n in range(24, 30):
    one = coded(n)
    row = {name: torch.tensor(values).view(1, -1) for name, values in one.items()}
    with torch.no_grad():
        outputs = model(**row, labels=row["input_ids"].clone())
    text = outputs.logits[0, -len(one["input_ids"]) : -1]
    at_label = torch.tensor(one["input_type_mask"])[1:] == 4  # the model changes what it is given
    right += int(text[at_label][0, answers].argmax()) == n % 2
print(f"RESULT {right} of 6, {outputs.loss:.4f}")
