"""`dan-fast share`: a trained network as a folder of weights, configuration and model card, and on the Hub."""

from dan_fast.nn.hub import FILES, hub_mixin
from dan_fast.nn.weights_hash import weights_hash
from dan_fast.training.build import network_of
from dan_fast.training.checkpoint import load_checkpoint
from dan_fast.training.shared import origin_of


def share(checkpoint: str, out: str, push: str | None = None) -> None:
    """Write a trained network as a folder to share, which `DAN.from_pretrained` reads: no code, no pickle.

    Args:
        checkpoint: The checkpoint.pt of a run, or its chosen.pt; the figures come from results.json beside it.
        out: Folder for model.safetensors, config.json and README.md, a model card. It must be new, empty, or written
            this way before.
        push: Also write the three files to this repository of the Hugging Face Hub, such as user/name, with the account
            of `hf auth login`. A repository that does not exist is created and is public: to keep it private, create a
            private one first.

    Raises:
        DanFastError: the checkpoint or results.json cannot be read, the folder cannot be written, or the Hub does not
            accept it.
    """
    if push is not None:
        hub_mixin("--push")
    state = load_checkpoint(checkpoint)
    network = network_of(state, checkpoint)
    training, results = origin_of(checkpoint, state, weights_hash(network))
    network.save_pretrained(out, training=training, results=results)
    print(f"{out}: {', '.join(FILES)}.")
    for evaluation in results:
        print(f"{evaluation.title}: {evaluation.conditions_and_recipe}.")
    if not results:
        print(
            f"No figures go with it: neither {checkpoint} nor a results.json beside it has any of this epoch and "
            "these weights."
        )
    if push is not None:
        print(network.push_to_hub(push, training=training, results=results))
