"""A classifier of pairs of sentences, in accelerate's loop, with metrics of all processes together.

python paraphrases.py MODEL OUTPUT        or        accelerate launch paraphrases.py MODEL OUTPUT
"""

import argparse

import torch
from accelerate import Accelerator
from peft import PeftModel, PromptEncoderConfig, get_peft_model
from torch.optim import AdamW
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup, set_seed


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("model_name_or_path")
    parser.add_argument("output_dir")
    parser.add_argument("--num_epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--batch_size", type=int, default=8)
    return parser.parse_args()


def main():
    args = parse_args()
    accelerator = Accelerator(cpu=True)
    set_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, padding_side="right")
    sentences = [f"w{n} is a city" + " big" * (n % 3) for n in range(32)]
    rows = [
        {**tokenizer(sentence, "paris is a city", truncation=True, max_length=None), "labels": n % 2}
        for n, sentence in enumerate(sentences)
    ]

    def collate_fn(examples):
        return tokenizer.pad(examples, padding="longest", return_tensors="pt")

    train_dataloader = DataLoader(rows, shuffle=True, collate_fn=collate_fn, batch_size=args.batch_size)
    eval_dataloader = DataLoader(rows, shuffle=False, collate_fn=collate_fn, batch_size=args.batch_size)
    model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, return_dict=True)
    peft_config = PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=20, encoder_hidden_size=32)
    model = get_peft_model(model, peft_config)
    optimizer = AdamW(params=model.parameters(), lr=args.lr)
    lr_scheduler = get_linear_schedule_with_warmup(
        optimizer=optimizer,
        num_warmup_steps=0.06 * (len(train_dataloader) * args.num_epochs),
        num_training_steps=(len(train_dataloader) * args.num_epochs),
    )
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )
    for epoch in range(args.num_epochs):
        model.train()
        total = 0.0
        for batch in tqdm(train_dataloader, disable=not accelerator.is_local_main_process):
            outputs = model(**batch)
            loss = outputs.loss
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            total += accelerator.reduce(loss.detach(), "mean").item()
        model.eval()
        right = seen = 0
        for batch in eval_dataloader:
            with torch.no_grad():
                outputs = model(**batch)
            predictions = outputs.logits.argmax(dim=-1)
            predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
            right, seen = right + (predictions == references).sum().item(), seen + len(references)
        accelerator.print(f"RESULT epoch {epoch}: {total / len(train_dataloader):.5f}, {right} of {seen}")

    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(args.output_dir, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    inference_model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path)
    inference_model = PeftModel.from_pretrained(inference_model, args.output_dir).eval()
    batch = collate_fn(rows[:8])
    with torch.no_grad():
        logits = inference_model(**batch).logits
    accelerator.print(f"RESULT {logits.sum().item():.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
