"""TRL's trainers with a prompt model. TRL is no requirement of the tests: `make trl` installs it and runs this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models import ours, tokens

trl = pytest.importorskip("trl")

from test_apply_trl import tokenizer  # noqa: E402


@pytest.mark.parametrize("method", ["PROMPT", "MLP"])
@pytest.mark.parametrize("kind", ["default", "nll"])
def test_sft_trainer_trains_with_the_model_s_own_loss(method: str, kind: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from datasets.table import InMemoryTable

    rows = tokens(8).tolist()
    model = ours("Llama", method=method, tie_word_embeddings=True)
    with torch.no_grad():
        expected = float(model(input_ids=tokens(8), labels=tokens(8)).loss)
    options: dict[str, Any] = {} if kind == "default" else {"loss_type": kind}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=8,
        learning_rate=1e-1,
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **options,
    )
    table = InMemoryTable.from_pydict({"input_ids": rows, "labels": rows})
    data = Dataset(table, fingerprint="rows")
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, rel=1e-4) and losses[-1] < losses[0]
    names = {file.name for file in (tmp_path / "checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
