"""An encoder-decoder that writes the class of a headline: Seq2SeqTrainer, which generates to evaluate.

python headlines.py MODEL OUTPUT
"""

import os
import sys

import numpy as np
import torch
from peft import PeftConfig, PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    default_data_collator,
    set_seed,
)

os.environ["TOKENIZERS_PARALLELISM"] = "false"
model_name_or_path, output = sys.argv[1:3]
set_seed(3)
peft_config = PromptTuningConfig(
    task_type=TaskType.SEQ_2_SEQ_LM,
    prompt_tuning_init=PromptTuningInit.TEXT,
    num_virtual_tokens=20,
    prompt_tuning_init_text="is the city big",
    inference_mode=False,
    tokenizer_name_or_path=model_name_or_path,
)
model = AutoModelForSeq2SeqLM.from_pretrained(model_name_or_path)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()
tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)


def preprocess(n):
    inputs = tokenizer(f"w{n} is a city", max_length=8, padding="max_length", truncation=True)
    labels = tokenizer(("no", "yes")[n % 2], max_length=2, padding="max_length", truncation=True)["input_ids"]
    return {**inputs, "labels": [-100 if id == tokenizer.pad_token_id else id for id in labels]}


def compute_metrics(eval_preds):
    preds, labels = eval_preds
    preds = np.where(preds < 0, tokenizer.pad_token_id, preds)
    labels = np.where(labels < 0, tokenizer.pad_token_id, labels)
    preds = tokenizer.batch_decode(preds, skip_special_tokens=True)
    labels = tokenizer.batch_decode(labels, skip_special_tokens=True)
    return {"accuracy": sum(a.strip() == b.strip() for a, b in zip(preds, labels)) / len(labels)}


training_args = Seq2SeqTrainingArguments(
    output,
    per_device_train_batch_size=8,
    learning_rate=1e-1,
    num_train_epochs=2,
    eval_strategy="epoch",
    logging_strategy="epoch",
    save_strategy="no",
    report_to=[],
    predict_with_generate=True,
    use_cpu=True,
    generation_config=GenerationConfig(max_length=8, decoder_start_token_id=model.config.decoder_start_token_id),
)
trainer = Seq2SeqTrainer(
    model=model,
    processing_class=tokenizer,
    args=training_args,
    train_dataset=[preprocess(n) for n in range(32)],
    eval_dataset=[preprocess(n) for n in range(32, 40)],
    data_collator=default_data_collator,
    compute_metrics=compute_metrics,
)
trainer.train()
for entry in trainer.state.log_history:
    print("RESULT", {name: round(entry[name], 4) for name in ("loss", "eval_loss", "eval_accuracy") if name in entry})

model.save_pretrained(output)
config = PeftConfig.from_pretrained(output)
model = AutoModelForSeq2SeqLM.from_pretrained(config.base_model_name_or_path)
model = PeftModel.from_pretrained(model, output)
model.eval()
inputs = tokenizer("w5 is a city", return_tensors="pt")
with torch.no_grad():
    outputs = model.generate(input_ids=inputs["input_ids"], max_new_tokens=10)
print("RESULT", tokenizer.batch_decode(outputs.detach().cpu().numpy(), skip_special_tokens=True))
