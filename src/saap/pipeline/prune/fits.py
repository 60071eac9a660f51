"""Whether what a run will take is there: memory, memory of an accelerator, disk."""

from __future__ import annotations

from pathlib import Path

from saap.core.errors import ConfigurationError
from saap.export.placing import check_place
from saap.models.checkpoint.safetensor_files import weight_files
from saap.models.loading import device_memory
from saap.models.loading.devices import pick_device, working_dtype
from saap.models.loading.references import resolve_model
from saap.pipeline.prune.forecast import Forecast
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.inputs import RunOptions
from saap.pipeline.shared.stages import RESTORE


def check_fits(found: Forecast, run: Run, out: Path | None) -> None:
    """Raise ConfigurationError or OutputError if the run needs more memory or disk than there is, with the remedy."""
    if out is not None:
        check_place(out, found.disk_bytes)
    on_device = device_memory.of_device(run.device)
    if on_device is not None and found.peak_device_bytes > on_device:
        worst = max(found.stages, key=lambda stage: stage.peak_device_bytes)
        raise _too_little(worst.name, worst.peak_device_bytes, on_device, str(run.device), "Use --device cpu")
    free = device_memory.of_machine()
    if found.peak_resident_bytes <= free:
        return
    worst = max(found.stages, key=lambda stage: stage.peak_resident_bytes)
    others = [stage for stage in found.stages if stage.name != RESTORE.title]
    remedy = "Use a machine with more memory, or a smaller model"
    if max(stage.peak_resident_bytes for stage in others) <= free and run.config.restore:
        lacking = found.peak_resident_bytes - free
        fewer = (
            found.refit_tokens - int(lacking / found.bytes_per_refit_token) - 1 if found.bytes_per_refit_token else 0
        )
        fewer = fewer // 1024 * 1024
        remedy = f"Use --refit-tokens {fewer}" if fewer >= 1024 else "Use --no-restore"
    raise _too_little(worst.name, found.peak_resident_bytes, free, "", remedy)


def _too_little(stage: str, needed: int, free: int, where: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(
        f"The stage {stage!r} needs {needed / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB are free"
        f"{' on ' + where if where else ''}",
        remedy,
    )


def check_weights_fit(source: str | Path, options: RunOptions) -> None:
    """Raise ConfigurationError, before they are read, if the weights alone need more memory than there is.

    Only for safetensors on the CPU: of other files the size in memory is not known before they are read.
    """
    resolved = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
    device = pick_device(options.device)
    free = device_memory.of_machine()
    if resolved.gguf_file is not None or device.type != "cpu":
        return
    stored = sum(file.stat().st_size for file in weight_files(resolved.folder))
    needed = stored // resolved.dtype.itemsize * working_dtype(device, resolved.dtype).itemsize
    if needed > free:
        raise ConfigurationError(
            f"The weights of {source} need {needed / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB are free",
            "Use a machine with more memory, or a smaller model",
        )
