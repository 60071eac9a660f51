"""`import saap.auto` registers pruned checkpoints with the auto classes: they open without `trust_remote_code`."""

from __future__ import annotations

from saap.models.loading.pretrained import register_pruned_models

register_pruned_models()
