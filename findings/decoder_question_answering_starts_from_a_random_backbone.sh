#!/bin/sh
# transformers 5.23.0: AutoModelForQuestionAnswering.from_pretrained of a Llama, Qwen2 or Qwen3
# checkpoint loads none of its weights. The class keeps its backbone under "transformer", the
# checkpoint under "model", and names are matched by the class's own prefix. The sequence
# classifier of the same family is right. An adapter trained on such a model fits no base.
# Ends with 0 while that is so, with 1 when it changes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q \
  torch==2.13.0 transformers==5.23.0 safetensors
cd "$work"
TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
             num_attention_heads=4, num_key_value_heads=2)
as_it_was = True
for family in ("Llama", "Qwen2", "Qwen3"):
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(family)
    wanted = model.model.layers[0].mlp.up_proj.weight
    classifier = AutoModelForSequenceClassification.from_pretrained(family)
    answerer, report = AutoModelForQuestionAnswering.from_pretrained(
        family, output_loading_info=True
    )
    right = torch.equal(classifier.model.layers[0].mlp.up_proj.weight, wanted)
    loaded = torch.equal(answerer.transformer.layers[0].mlp.up_proj.weight, wanted)
    print(f"transformers {transformers.__version__}, {family}: sequence classifier loaded: {right}; "
          f"question answering loaded: {loaded}, {len(report['missing_keys'])} keys missing")
    as_it_was = as_it_was and right and not loaded
sys.exit(0 if as_it_was else 1)
PYTHON
