"""`import saap.auto` lets transformers' auto classes open pruned checkpoints without `trust_remote_code`."""

from __future__ import annotations

from saap.models.loading.pretrained import register_pruned_models

register_pruned_models()
