"""P-tune a small language model with PEFT and Trainer, on fusedprompt's ops and routes: one line of difference.

    python examples/peft_trainer.py [--plain] [--steps 20]

Needs PEFT and accelerate. Nothing is downloaded: the model is built from a configuration, the text is made up.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import peft
import torch
import transformers

import fusedprompt


def build() -> peft.PeftModel:
    """A random 4-layer Llama with a P-tuning prompt of 40 rows."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    base = transformers.LlamaForCausalLM(config)
    return peft.get_peft_model(base, peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=40))


def texts(number: int = 64, length: int = 24) -> list[dict[str, torch.Tensor]]:
    """Rows that count upwards from a random number."""
    starts = torch.randint(3, 1900, (number, 1), generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    return [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}
        for row in starts + torch.arange(length)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", action="store_true", help="leave PEFT as it is, for comparison")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    model = build()
    if not options.plain:
        print(fusedprompt.apply(model))  # the one line
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=texts())
        begin = time.perf_counter()
        result = trainer.train()
        print(f"loss {result.training_loss:.5f} after {options.steps} steps in {time.perf_counter() - begin:.1f} s")
        model.save_pretrained(folder)
        reloaded = peft.PeftModel.from_pretrained(build().get_base_model(), folder)
        same = torch.equal(reloaded.get_prompt(1), model.get_prompt(1))
        print(f"reloaded by PEFT: the prompt is {'the same' if same else 'another'}")


if __name__ == "__main__":
    main()
