"""What a checkpoint's manifest says of its run, and whether it is this one."""

from pathlib import Path

from tnl.errors import CheckpointError, DataError
from tnl.training.run_data import RunData
from tnl.training.run_folder import config_hash, versions
from tnl.training.settings import RunSettings


def identity(settings: RunSettings, data: RunData, base_fingerprint: str | None) -> dict:
    """Fields of the manifest. ``base_fingerprint``: of the checkpoint that the run began from."""
    return {
        "config_sha256": config_hash(settings),
        "data_fingerprint": data.loader.fingerprint,
        "tokenizer_sha256": data.tokenizer_sha256,
        "base_fingerprint": base_fingerprint,
        "zero_stage": settings.train.zero_stage,
        "versions": versions(),
    }


def check_same_run(manifest: dict, own: dict, checkpoint: Path) -> None:
    """Refuse the checkpoint of another run than the one with the identity ``own``, whatever the files beside it say.

    Raises:
        DataError: trained with another tokenizer.
        CheckpointError: trained on other data, from another checkpoint or with another configuration.
    """
    cure = "point the data section to the data that this run began with"
    if manifest["tokenizer_sha256"] != own["tokenizer_sha256"]:
        raise DataError(
            f"{checkpoint}: trained with the tokenizer {manifest['tokenizer_sha256'][:12]}, the data have "
            f"{own['tokenizer_sha256'][:12]}; {cure}"
        )
    if manifest["data_fingerprint"] != own["data_fingerprint"]:
        raise CheckpointError(
            f"{checkpoint}: trained on the data {manifest['data_fingerprint'][:12]}, the data section gives "
            f"{own['data_fingerprint'][:12]}; {cure}, or begin a new run in another output folder"
        )
    if manifest["base_fingerprint"] != own["base_fingerprint"]:
        raise CheckpointError(
            f"{checkpoint}: began from other weights or another config.json than init_from has now; put the old "
            "ones back, or begin a new run in another output folder"
        )
    if manifest["config_sha256"] != own["config_sha256"]:
        raise CheckpointError(
            f"{checkpoint}: saved with another configuration than this one; undo the change, or begin a new run in "
            "another output folder"
        )
