"""Multitask prompt tuning: two source tasks, then one that begins with the first of them.

python two_tasks.py MODEL OUTPUT
"""

import sys

import torch
from peft import (
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
    TaskType,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch.optim.adamw import AdamW
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, get_cosine_schedule_with_warmup, set_seed

set_seed(42)
model_name, output = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(model_name)


class Examples(Dataset):
    def __init__(self, tasks):
        self.examples = [
            {"input": f"w{n} is a city", "output": (("no", "yes"), ("rome", "paris"))[task][n % 2], "task_id": task}
            for n in range(16)
            for task in tasks
        ]

    def __getitem__(self, index):
        return self.examples[index]

    def __len__(self):
        return len(self.examples)


def collate_fn(batch):
    input = tokenizer([i["input"] for i in batch], add_special_tokens=False, return_tensors="pt", padding=True)
    output = tokenizer([i["output"] for i in batch], add_special_tokens=False, return_tensors="pt", padding=True)
    labels = output.input_ids
    labels[labels == tokenizer.pad_token_id] = -100
    return {
        "input_ids": input.input_ids,
        "attention_mask": input.attention_mask,
        "labels": labels,
        "task_ids": torch.tensor([i["task_id"] for i in batch]),
    }


@torch.inference_mode()
def evaluate(model, data):
    return sum(model(**batch).loss for batch in data) / len(data)


def learn(model, train, val):
    optimizer = AdamW(model.parameters(), lr=1e-1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 2, len(train))
    progress = tqdm(train)
    print(f"RESULT before: {evaluate(model, val):.5f}")
    for batch in progress:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        progress.set_postfix(train_loss=loss)
    print(f"RESULT after: {evaluate(model, val):.5f}")


def config_of(**fields):
    return MultitaskPromptTuningConfig(
        tokenizer_name_or_path=model_name,
        task_type=TaskType.SEQ_2_SEQ_LM,
        num_virtual_tokens=10,
        num_transformer_submodules=1,
        **fields,
    )


source = config_of(
    num_tasks=2,
    prompt_tuning_init=MultitaskPromptTuningInit.TEXT,
    prompt_tuning_init_text="is the city big or a capital",
)
model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(model_name), source)
train = DataLoader(Examples((0, 1)), shuffle=True, batch_size=8, collate_fn=collate_fn)
val = DataLoader(Examples((0,)), shuffle=False, batch_size=8, collate_fn=collate_fn)
learn(model, train, val)
model.save_pretrained(f"{output}/source")

target = config_of(
    num_tasks=1,
    prompt_tuning_init=MultitaskPromptTuningInit.EXACT_SOURCE_TASK,
    prompt_tuning_init_state_dict_path=f"{output}/source/adapter_model.safetensors",
)
model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(model_name), target)
learn(model, DataLoader(Examples((0,)), shuffle=True, batch_size=8, collate_fn=collate_fn), val)
model.save_pretrained(f"{output}/target")
set_peft_model_state_dict(model, load_file(f"{output}/target/adapter_model.safetensors"))
print(f"RESULT loaded: {evaluate(model, val):.5f}")
