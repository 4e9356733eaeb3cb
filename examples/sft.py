"""Instruction tuning with a prompt: questions and answers in the model's own chat format; answers alone have labels.

    make models && python examples/sft.py [--model FOLDER] [--virtual-tokens 16] [--steps 30]

The user says what something in Python's standard library does, the assistant answers with its name. The head runs on
labelled tokens alone. With the defaults the held-out loss of answers is 7.83 without a prompt, and 2.36 with it.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from _data import documented, split
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import fusedprompt as fp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="build/models/SmolLM2-135M-Instruct")
    parser.add_argument("--virtual-tokens", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def question(row: dict[str, str]) -> list[int]:
        said = [{"role": "user", "content": f"What is this in Python's module {row['module']}? {row['text']}."}]
        ids: list[int] = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        return ids

    def labelled(row: dict[str, str]) -> dict[str, list[int]]:
        asked, answer = question(row), tokenizer(row["name"], add_special_tokens=False).input_ids
        answer = [*answer, tokenizer.eos_token_id]
        return {"input_ids": asked + answer, "labels": [-100] * len(asked) + answer}

    train, held_out = split(documented(), 48)
    config = fp.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=options.virtual_tokens)
    model = fp.get_prompt_model(AutoModelForCausalLM.from_pretrained(options.model, dtype="float32"), config)

    def answer(model: fp.PromptModel, row: dict[str, str]) -> str:
        ids = torch.tensor([question(row)])
        new = model.eval().generate(input_ids=ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            logging_steps=10,
            prediction_loss_only=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        collate = DataCollatorForSeq2Seq(tokenizer)  # pads labels with -100
        rows = {"train_dataset": [*map(labelled, train)], "eval_dataset": [*map(labelled, held_out)]}
        trainer = Trainer(model, arguments, collate, **rows)
        with model.disable_adapter():
            without, said = trainer.evaluate()["eval_loss"], answer(model, held_out[0])
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        model.save_pretrained(folder)
        again = fp.PromptModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(options.model, dtype="float32"), folder
        )
    print(f"held-out loss of answers: {without:.3f} without a prompt, {after:.3f} with it")
    print(f"{held_out[0]}\n  without: {said!r}\n  with: {answer(model, held_out[0])!r}")
    same = all(answer(again, row) == answer(model, row) for row in held_out[:4])
    print(f"reloaded: answers are {'the same' if same else 'others'}")


if __name__ == "__main__":
    main()
