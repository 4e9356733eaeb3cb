"""TRL's SFTTrainer trains a patched PEFT model as an unpatched one. Runs where TRL is installed: `make trl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fusedprompt
from models import EOS, PAD, VOCAB, tokens
from test_apply_results import peft_model
from tolerance import one_thread  # noqa: F401

trl = pytest.importorskip("trl")


def tokenizer() -> Any:
    """Words are the decimal names of the ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(index): index for index in range(VOCAB)}, unk_token="2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=str(PAD), eos_token=str(EOS), unk_token="2")


def trained(method: str, patched: bool, folder: Path, **fields: Any) -> list[float]:
    """Losses, gradient norms and token accuracies of five steps; rows of several lengths, so that some are padded."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    model = peft_model("Llama", method=method)
    patch = fusedprompt.apply(model) if patched else None
    texts = [row[: 4 + index % 4].tolist() for index, row in enumerate(tokens(80))]
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=24,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=3,
        dataset_kwargs={"skip_prepare_dataset": True},
        **fields,
    )
    table = InMemoryTable.from_pydict({"input_ids": texts, "labels": texts})
    # Named, because not every pyarrow has tables that `Dataset.from_dict` can hash.
    rows = Dataset(table, fingerprint="rows")
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer())
    trainer.train()
    if patch is not None:
        assert patch.active and not patch.refused
        # Its own head, beside the base model's, asks for every position's hidden states.
        assert "fused_lm_head is an argument" in patch.report()
    names = ("loss", "grad_norm", "mean_token_accuracy")
    return [entry[name] for entry in trainer.state.log_history for name in names if name in entry]


@pytest.mark.parametrize("method", ["PROMPT", "MLP", "LSTM"])
def test_sft_trainer_gives_the_losses_of_plain_peft(method: str, tmp_path: Path) -> None:
    theirs, ours = (trained(method, patched, tmp_path) for patched in (False, True))
    assert len(theirs) == 15
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_accumulated_gradients_too(tmp_path: Path) -> None:
    fields = {"gradient_accumulation_steps": 2, "loss_type": "nll"}
    theirs, ours = (trained("MLP", patched, tmp_path, **fields) for patched in (False, True))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert torch.tensor(theirs).isfinite().all()
