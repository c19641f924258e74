#!/usr/bin/env bash
# One GPU with 40 GB or more: Qwen2.5-7B-Instruct in bfloat16 (15 GB) and Whisper large-v3, on any NeMo manifest with text.
# Memory: 15 GB LLM, 13.5 GB connector (Whisper's decoder) with Adam, activations of 16 x 100 positions 5.5 GB, or 0.4 GB with
# activation_checkpointing. With 24 GB: ASR=openai/whisper-large-v3-turbo, whose decoder takes 1.7 GB.
set -euo pipefail
MANIFEST=${MANIFEST:?NeMo JSONL manifest: audio_filepath, duration, text}
D=${D:-runs/one_gpu}
LLM=${LLM:-Qwen/Qwen2.5-7B-Instruct}
ASR=${ASR:-openai/whisper-large-v3}

python -m nemo_mtbi.examples.prepare_data output_dir="$D" "sources=[{kind: nemo, path: '$MANIFEST'}]" \
  "split.shares={train: 0.9, validation: 0.05, held_out: 0.05}"
python -m nemo_mtbi.examples.cache_features "manifests=[$D/cuts.train.jsonl, $D/cuts.validation.jsonl, $D/cuts.held_out.jsonl]" \
  model.pretrained_asr="$ASR" model.encoder_dtype=bfloat16
python -m nemo_mtbi.examples.generate_targets output_dir="$D/targets" llm="$LLM" top_k=32 \
  "cuts={train: $D/cuts.train.jsonl, validation: $D/cuts.validation.jsonl, held_out: $D/cuts.held_out.jsonl}"
python -m nemo_mtbi.examples.train output_dir="$D/train" data.cached_features=true \
  model.pretrained_llm="$LLM" model.pretrained_asr="$ASR" model.perception.modality_adapter.language=en model.prompt_format=chat_template \
  model.encoder_dtype=bfloat16 model.imitation.teacher=cached model.activation_checkpointing=true \
  data.train_ds.input_cfg.0.cuts_path="$D/targets/train.jsonl" \
  data.validation_ds.datasets.held_out.input_cfg.0.cuts_path="$D/targets/validation.jsonl" \
  data.train_ds.batch_size=16 trainer.accumulate_grad_batches=2 trainer.max_steps=20000 alignment_stage.trainer.max_steps=5000
python -m nemo_mtbi.examples.evaluate run="$D/train" cached_features=true "cuts={held_out: $D/targets/held_out.jsonl}"
python -m nemo_mtbi.examples.export run="$D/train" nemo="$D/model.nemo" hf="$D/hf"
