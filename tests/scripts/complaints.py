"""A causal language model that names the class of a text: a training loop by hand, saved, loaded and asked.

python complaints.py MODEL OUTPUT [prompt | prefix | p-tuning]
"""

import sys

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
)
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    default_data_collator,
    get_linear_schedule_with_warmup,
    set_seed,
)

model_name_or_path, output, method = sys.argv[1:4]
device = "cpu"
max_length = 16
lr = 3e-2
num_epochs = 2
batch_size = 8
if method == "prompt":
    peft_config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        prompt_tuning_init=PromptTuningInit.TEXT,
        num_virtual_tokens=8,
        prompt_tuning_init_text="is the city big yes no",
        tokenizer_name_or_path=model_name_or_path,
    )
elif method == "prefix":
    peft_config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=30)
else:
    peft_config = PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=20, encoder_hidden_size=32)

set_seed(42)
tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)
if tokenizer.pad_token_id is None:
    tokenizer.pad_token_id = tokenizer.eos_token_id
rows = [{"text": f"w{n} is a city", "label": ("no", "yes")[n % 2]} for n in range(32)]


def preprocess(row, with_label=True):
    ids = tokenizer(f"{row['text']} is the city big")["input_ids"]
    answer = tokenizer(row["label"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    labels = [-100] * len(ids) + answer
    ids = ids + answer
    gap = max_length - len(ids)
    return {
        "input_ids": torch.tensor([tokenizer.pad_token_id] * gap + ids),
        "attention_mask": torch.tensor([0] * gap + [1] * len(ids)),
        "labels": torch.tensor([-100] * gap + labels),
    }


dataset = [preprocess(row) for row in rows]
train_dataloader = DataLoader(dataset, shuffle=True, collate_fn=default_data_collator, batch_size=batch_size)
eval_dataloader = DataLoader(dataset, collate_fn=default_data_collator, batch_size=batch_size)

model = AutoModelForCausalLM.from_pretrained(model_name_or_path)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()
optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
lr_scheduler = get_linear_schedule_with_warmup(
    optimizer=optimizer, num_warmup_steps=0, num_training_steps=(len(train_dataloader) * num_epochs)
)
model = model.to(device)
for epoch in range(num_epochs):
    model.train()
    total_loss = 0
    for batch in tqdm(train_dataloader):
        batch = {k: v.to(device) for k, v in batch.items()}
        outputs = model(**batch)
        loss = outputs.loss
        total_loss += loss.detach().float()
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
    model.eval()
    eval_loss, predictions = 0, []
    for batch in tqdm(eval_dataloader):
        batch = {k: v.to(device) for k, v in batch.items()}
        with torch.no_grad():
            outputs = model(**batch)
        eval_loss += outputs.loss.detach().float()
        predictions.extend(
            tokenizer.batch_decode(torch.argmax(outputs.logits, -1).detach().cpu().numpy(), skip_special_tokens=True)
        )
    train_loss, eval_loss = total_loss / len(train_dataloader), eval_loss / len(eval_dataloader)
    print(
        f"RESULT epoch {epoch}: {train_loss:.5f} {torch.exp(train_loss):.4f} {eval_loss:.5f} {torch.exp(eval_loss):.4f}"
    )

model.save_pretrained(output)
inputs = tokenizer("w5 is a city is the city big", return_tensors="pt")
config = PeftConfig.from_pretrained(output)
loaded = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path)
loaded = PeftModel.from_pretrained(loaded, output)
for one in (model, loaded.to(device).eval()):
    with torch.no_grad():
        answer = one.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=10, eos_token_id=3
        )
    print("RESULT", tokenizer.batch_decode(answer.detach().cpu().numpy(), skip_special_tokens=True))
