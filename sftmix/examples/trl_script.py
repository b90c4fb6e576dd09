"""A TRL script with SFTMix: two lines differ from ``SFTTrainer``'s.

    python -m sftmix.examples.trl_script --model_name_or_path MODEL --dataset_name FILE.jsonl --output_dir OUT \
        --reference online

FILE: JSON lines with ``prompt`` and ``completion``, or ``messages``, as TRL reads them. Any option of ``SFTMixConfig``
is a flag.
"""

from __future__ import annotations

from collections.abc import Sequence

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from sftmix.trl import SFTMixConfig, SFTMixTrainer  # from trl import SFTConfig, SFTTrainer


def main(argv: Sequence[str] | None = None) -> SFTMixTrainer:
    parser = TrlParser((ScriptArguments, SFTMixConfig, ModelConfig))
    script, config, model = parser.parse_args_and_config(argv)
    trainer = SFTMixTrainer(  # trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=config,
        train_dataset=load_dataset("json", data_files=script.dataset_name, split="train"),
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_model(config.output_dir)
    return trainer


if __name__ == "__main__":
    main()
