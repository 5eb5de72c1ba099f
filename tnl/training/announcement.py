"""What a run says of itself before its first step."""

from collections.abc import Callable

from tnl_kernels.dispatch import form_of

from tnl.model.kinds import num_parameters
from tnl.model.sequence_parallel import exchanged_bytes
from tnl.model.tensor_parallel import reduced_bytes, sliced_config
from tnl.training.engine import Ranks
from tnl.training.memory import DTYPES
from tnl.training.mesh import Mesh
from tnl.training.settings import RunSettings


def announce(
    settings: RunSettings,
    network,
    ranks: Ranks,
    mesh: Mesh,
    *,
    first_step: int,
    peak: float | None,
    peak_source: str,
    say: Callable[[str], None],
) -> None:
    """Say how large the run is, what it runs on, and what ranks exchange.

    Args:
        network: configuration of the model.
        first_step: steps that are done already.
        peak: FLOP/s of one device, known from ``peak_source``; None where it is not known.
    """
    train = settings.train
    say(
        f"{settings.output}: {num_parameters(network):,} parameters, {train.steps} steps of "
        f"{train.global_batch_size} x {train.sequence_length} tokens, {ranks.world_size} process(es) on "
        f"{ranks.device.type}, {train.precision}, ZeRO {train.zero_stage}"
        + (f", resumed at step {first_step}" if first_step else "")
    )
    peak_text = "unknown" if peak is None else f"{peak / 1e12:.2f} TFLOP/s"
    say(f"operators: {form_of(ranks.device)} form; peak of one device: {peak_text} ({peak_source})")
    if mesh.sequence_size > 1:
        own = sliced_config(network, train.tensor_parallel)
        received = exchanged_bytes(own, train.micro_batch_size, mesh.sequence_size)
        say(
            f"sequence parallel: {mesh.sequence_size} ranks share a window, "
            f"{train.sequence_length // mesh.sequence_size} tokens each; a layer receives "
            f"{max(received) / 2**20:.3f} MiB at most, a forward pass {sum(received) / 2**20:.3f} MiB and a "
            "backward pass the same, however long the window"
        )
    if train.tensor_parallel > 1:
        tokens = train.micro_batch_size * (train.segment_length or train.sequence_length // train.sequence_parallel)
        forward, backward = reduced_bytes(network, tokens, DTYPES[train.precision])
        say(
            f"tensor parallel: {train.tensor_parallel} ranks share the heads and channels of every block, "
            f"{network.decoder_attention_heads // train.tensor_parallel} heads each; a layer sums "
            f"{forward / 2**20:.3f} MiB over them in a forward pass and {backward / 2**20:.3f} MiB in a backward pass"
        )
