"""Watch the effective rank of a LoRA adapter while transformers' Trainer trains it.

python examples/callback.py
"""

import tempfile
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import rankscope


def main() -> None:
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    warnings.simplefilter("ignore", FutureWarning)  # PEFT calls transformers by names of yesterday
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    rows = torch.randint(0, 128, (64, 1), generator=torch.Generator().manual_seed(0)) + torch.arange(16)
    data = [{"input_ids": row % 128, "labels": row % 128} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=30, logging_steps=10, learning_rate=1e-2, report_to="none", save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, settings, train_dataset=data, callbacks=[rankscope.RankCallback(per_layer=False)])
        trainer.train()
    for line in trainer.state.log_history[:-1]:
        ranks = {key.rpartition("/")[2]: round(value, 3) for key, value in line.items() if key.startswith("rank/")}
        print(f"step {line['step']}  loss {line['loss']:.3f}  {ranks}")


if __name__ == "__main__":
    main()
