#!/usr/bin/env bash
# LibriSpeech on one node with 8 GPUs: Whisper large-v3 + Qwen2.5-7B-Instruct, 960 h, data-parallel training.
# Needs access to the corpora and the models; every step continues where it was when it is run again.
set -euo pipefail
D=${D:-runs/librispeech}
CORPUS=${CORPUS:?folder of LibriSpeech, as lhotse prepare librispeech expects it}
LLM=${LLM:-Qwen/Qwen2.5-7B-Instruct}
ASR=${ASR:-openai/whisper-large-v3}

# The official parts stay apart: one call for each.
python -m nemo_mtbi.examples.prepare_data output_dir="$D/train" "split.shares={train: 1.0}" \
  "sources=[{kind: lhotse_recipe, name: librispeech, path: '$CORPUS', language: en, options: {dataset_parts: [train-clean-100, train-clean-360, train-other-500]}}]"
python -m nemo_mtbi.examples.prepare_data output_dir="$D/validation" "split.shares={validation: 1.0}" \
  "sources=[{kind: lhotse_recipe, name: librispeech, path: '$CORPUS', language: en, options: {dataset_parts: [dev-clean]}}]"
python -m nemo_mtbi.examples.prepare_data output_dir="$D/held_out" "split.shares={held_out: 1.0}" \
  "sources=[{kind: lhotse_recipe, name: librispeech, path: '$CORPUS', language: en, options: {dataset_parts: [test-clean]}}]"
python -m nemo_mtbi.examples.cache_features "manifests=[$D/train/cuts.train.jsonl, $D/validation/cuts.validation.jsonl, $D/held_out/cuts.held_out.jsonl]" \
  model.pretrained_asr="$ASR" model.perception.input_length=trained model.encoder_dtype=bfloat16
python -m nemo_mtbi.examples.generate_targets output_dir="$D/targets" llm="$LLM" batch_size=256 top_k=32 \
  "cuts={train: $D/train/cuts.train.jsonl, validation: $D/validation/cuts.validation.jsonl, held_out: $D/held_out/cuts.held_out.jsonl}"
python -m nemo_mtbi.examples.train output_dir="$D/train" data.cached_features=true \
  model.pretrained_llm="$LLM" model.pretrained_asr="$ASR" model.perception.modality_adapter.language=en model.prompt_format=chat_template \
  model.perception.input_length=trained model.encoder_dtype=bfloat16 model.imitation.teacher=cached \
  data.train_ds.input_cfg.0.cuts_path="$D/targets/train.jsonl" \
  data.validation_ds.datasets.held_out.input_cfg.0.cuts_path="$D/targets/validation.jsonl" \
  trainer.devices=8 trainer.max_steps=20000 \
  alignment_stage.trainer.max_steps=5000
python -m nemo_mtbi.examples.evaluate run="$D/train" cached_features=true "cuts={held_out: $D/targets/held_out.jsonl}"
python -m nemo_mtbi.examples.export run="$D/train" nemo="$D/model.nemo" hf="$D/hf"
