"""A network in a folder of its own, as the Hugging Face Hub keeps it: model.safetensors, config.json, README.md."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from dan_fast import __version__
from dan_fast.core.errors import DanFastError
from dan_fast.core.files import alone, printable, remove_unfinished, write_together
from dan_fast.core.home import expanded
from dan_fast.core.optional import optional
from dan_fast.core.preprocessing import Preprocessing
from dan_fast.nn.backbones.weights import load_fitting, read_state_dict
from dan_fast.nn.model_card import model_card

if TYPE_CHECKING:
    from dan_fast.evaluation.result import Evaluation
    from dan_fast.nn.network import DAN

    Network = TypeVar("Network", bound=DAN)

# Another number where a network is built of other arguments, or where they have another meaning.
FORMAT = "dan_fast network 1"
FILES = WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_SECTIONS = ("dan_fast", "network", "preprocessing", "weights_sha256", "training", "results")


def save_network(
    network: DAN,
    folder: str | os.PathLike[str],
    training: Mapping[str, Any] | None,
    results: Sequence[Evaluation],
    name: str | None = None,
) -> None:
    """See `DAN.save_pretrained`; the card calls the network by `name`, else by that of the folder."""
    folder = expanded(folder)
    if network.backbone_name is None:
        raise DanFastError(
            f"A network around a module cannot be built again from {CONFIG}: give DAN its backbone by name, or save "
            "its state_dict() and keep the code that makes the module."
        )
    try:
        arguments = _arguments(network)
    except AttributeError as error:
        raise _was_changed(str(error)) from error
    _require_readable(network, arguments)
    # safetensors takes neither channels_last nor storage that tensors share.
    weights = save(
        {
            key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, value in network.state_dict().items()
        },
        {"format": "pt"},
    )
    config = {
        "format": FORMAT,
        "dan_fast": __version__,
        "network": arguments,
        "preprocessing": network.preprocessing.to_dict(),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "training": None if training is None else _plain_json(training),
        "results": [each.to_dict() for each in results],
    }
    text = json.dumps(config, indent=2) + "\n"
    card = model_card(name or folder.resolve().name, network.classifier.in_features, config, results)
    contents = {WEIGHTS: weights, CONFIG: text.encode(), CARD: printable(card).encode()}
    _require_own_or_empty(folder)
    with alone(folder / ".lock"):
        remove_unfinished(folder)
        # The weights first, as Windows replaces none that are in use: all is as it was then. In a new folder it is the
        # configuration, by which a folder is known that a killed process has left.
        is_new = not (folder / CONFIG).exists()
        files = ((folder / name, contents[name]) for name in sorted(FILES, key=lambda name: is_new and name != CONFIG))
        try:
            write_together({path: lambda stream, content=content: stream.write(content) for path, content in files})
        except DanFastError:
            for name in FILES if is_new else ():
                (folder / name).unlink(missing_ok=True)
            raise


def read_folder(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights in a folder that `DAN.save_pretrained` wrote; no code in it is run.

    Raises:
        DanFastError: no such folder, or a file in it that is missing, damaged, of another version or of another
            network.
    """
    folder = expanded(folder)
    path, weights = folder / CONFIG, folder / WEIGHTS
    for file in (path, weights):
        if not file.is_file():
            raise DanFastError(
                f"{folder} has no {file.name}: name a folder that `dan-fast share` or DAN.save_pretrained wrote."
            )
    config = _read_config(path)
    if config is None:
        raise DanFastError(f"{path} is damaged or not of a network of dan_fast: name another folder or copy it again.")
    if config["format"] != FORMAT:
        raise DanFastError(
            f"{path} is in the format {config['format']!r} of dan_fast {config.get('dan_fast')}, and {__version__} "
            f"reads {FORMAT!r}: install that version, or have the network written again by this one."
        )
    missing = [section for section in _SECTIONS if section not in config]
    if missing:
        raise DanFastError(f"{path} lacks {', '.join(missing)}: copy the folder again.")
    with weights.open("rb") as stream:
        checksum = hashlib.file_digest(stream, "sha256").hexdigest()
    if checksum != config["weights_sha256"]:
        raise DanFastError(
            f"{weights} is damaged, cut short or not the file that {CONFIG} belongs to, its checksum does not fit: "
            "copy the folder again."
        )
    return config, read_state_dict(weights, "this network")


def network_of_folder(kind: type[Network], folder: str | os.PathLike[str]) -> Network:
    """The network in a folder, in eval mode on the CPU."""
    config, tensors = read_folder(folder)
    path, arguments = Path(folder) / CONFIG, config["network"]
    wanted = inspect.signature(kind).parameters.keys() - {"weights"}
    if not isinstance(arguments, dict) or arguments.keys() != wanted or not isinstance(arguments["backbone"], str):
        raise DanFastError(
            f"{path} does not describe a network by {', '.join(sorted(wanted))}, as this version does: install "
            f"dan_fast {config['dan_fast']}, which wrote it, or copy the folder again."
        )
    try:
        # The weights drawn here are overwritten; the process's random numbers go on as if nothing had been drawn.
        with torch.random.fork_rng(devices=[]):
            network = kind(**arguments)
        network.preprocessing = Preprocessing.from_dict(config["preprocessing"])
    # PyTorch's where a size is one that no memory can hold.
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DanFastError(f"{path} does not describe a network ({error}): copy the folder again.") from error
    load_fitting(network, tensors, f"DAN of {arguments['backbone']}", Path(folder) / WEIGHTS, lambda key: False)
    return network.eval().to("cpu", torch.float32)


def fetched_folder(source: str | os.PathLike[str], options: Mapping[str, Any]) -> Path:
    """The folder `source`; where there is none, that of the Hub's repository of this id, downloaded."""
    if expanded(source).is_dir():
        return expanded(source)
    if expanded(source).exists():
        raise DanFastError(
            f"{source} is a file: name the folder that DAN.save_pretrained wrote, or read a checkpoint with "
            "dan_fast.training.trained_network."
        )
    mixin = hub_mixin(f"There is no folder {source}, and fetching it from the Hugging Face Hub")
    try:
        return mixin.from_pretrained(str(source), **options).folder
    except TypeError:
        raise
    # huggingface_hub raises errors of its own and of the packages it downloads by.
    except Exception as error:
        raise DanFastError(
            f"There is no folder {source}, and the Hugging Face Hub did not give it ({_reason(error)}): check the name "
            "and the connection, and log in with `hf auth login` where it is private."
        ) from error


def push_network(
    network: DAN,
    repo_id: str,
    training: Mapping[str, Any] | None,
    results: Sequence[Evaluation],
    options: Mapping[str, Any],
) -> str:
    """See `DAN.push_to_hub`."""
    mixin = hub_mixin("Pushing to the Hugging Face Hub")
    try:
        folder = mixin(lambda folder: save_network(network, folder, training, results, repo_id))
        return str(folder.push_to_hub(repo_id, **options))
    except (TypeError, DanFastError):
        raise
    except Exception as error:
        raise DanFastError(
            f"{repo_id} could not be pushed to the Hugging Face Hub ({_reason(error)}): check the name and the "
            "connection, and log in with `hf auth login`."
        ) from error


def hub_mixin(purpose: str) -> type[Any]:
    """huggingface_hub's mixin around a folder; no base of `DAN`, which works without that package.

    `PyTorchModelHubMixin` would take a pickle where there is no model.safetensors, and weights that fit in part.

    Args:
        purpose: how the sentence begins where huggingface_hub is not installed.

    Raises:
        DanFastError: it is not installed.
    """
    hub = optional("huggingface_hub", f"{purpose} needs huggingface_hub: pip install 'dan-fast[hub]'")

    class Folder(hub.ModelHubMixin):
        """What `write` fills, or what has been fetched."""

        def __init__(self, write: Any = None, folder: Path | None = None) -> None:
            self.write, self.folder = write, folder

        def _save_pretrained(self, save_directory: Path) -> None:
            self.write(save_directory)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **options: Any) -> Folder:
            # All files of one commit, and none but these.
            return cls(folder=Path(hub.snapshot_download(model_id, allow_patterns=list(FILES), **options)))

    return Folder


def _arguments(network: DAN) -> dict[str, Any]:
    """What builds the network again, but for its weights."""
    return {
        "num_classes": network.classifier.out_features,
        "backbone": network.backbone_name,
        "image_size": list(network.image_size),
        "reduction": network.attention.reduction,
        "dropout": network.dropout.p,
        "attention": network.attention.variant,
        "adversary": network.adversary,
        "adversary_reach": network.adversary_reach,
        "feature": network.feature,
        "style_mixing": network.styles is not None,
        "gradient_checkpointing": network.backbone.gradient_checkpointing,
        "instance_norm": network.instance_norm,
    }


def _require_readable(network: DAN, arguments: dict[str, Any]) -> None:
    """Refuse a network whose parts were replaced or wrapped, so that its arguments build another one."""
    try:
        with torch.random.fork_rng(devices=[]):
            again = type(network)(**arguments)
    except TypeError as error:
        raise DanFastError(f"A {type(network).__name__} is not built by DAN's arguments: save a DAN.") from error
    own, built = ({name: tuple(value.shape) for name, value in each.state_dict().items()} for each in (network, again))
    differing = sorted(name for name, _ in own.items() ^ built.items())
    if differing:
        raise _was_changed(f"it differs in {differing[0]}")


def _was_changed(how: str) -> DanFastError:
    return DanFastError(
        f"A network that was changed after it was built cannot be built again from {CONFIG}, {how}: take parts out of "
        "torch.compile and other wrappers, or make the DAN as it is to be."
    )


def _plain_json(training: Mapping[str, Any]) -> dict[str, Any]:
    plain = dict(training)
    try:
        json.dumps(plain, allow_nan=False)
    except ValueError as error:  # NaN, or a list that holds itself
        raise TypeError(f"training is not plain JSON ({error}): give numbers that are finite") from error
    return plain


def _read_config(path: Path) -> dict[str, Any] | None:
    """The content of a config.json of whatever version; None where it is not of a network of dan_fast."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    named = isinstance(content, dict) and str(content.get("format")).startswith(FORMAT.rstrip("0123456789"))
    return content if named else None


def _require_own_or_empty(folder: Path) -> None:
    try:
        files = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    except FileNotFoundError:
        return
    except OSError as error:
        raise DanFastError(f"{folder} is no folder to write to ({error.strerror}): choose another one.") from error
    if files and _read_config(folder / CONFIG) is None:
        raise DanFastError(
            f"{folder} holds something else than a network of dan_fast, such as {min(files)}: choose an empty or a new "
            "folder."
        )


def _reason(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {first}"
