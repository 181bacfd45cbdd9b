"""What exported ONNX files score beside their network: mAP and rank 1 on targets, and what each file loses.

    python scripts/exported_accuracy.py a.onnx b.onnx --checkpoint run/checkpoint.pt --targets viper prid

Files of either input, made by `dan-fast export` from the same checkpoint. All rows see the same pixels.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch

from dan_fast.core.preprocessing import Preprocessing
from dan_fast.data import load_dataset
from dan_fast.evaluation import evaluate_dataset
from dan_fast.training.build import trained_network


def embedding(file: str, preprocessing: Preprocessing) -> Callable[[torch.Tensor], torch.Tensor]:
    """The file as `embed` of an evaluation: (B, 3, H, W) normalised to (B, C)."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in preprocessing[:2])
    takes_uint8 = session.get_modelmeta().custom_metadata_map["input"] == "uint8"

    def embed(images: torch.Tensor) -> torch.Tensor:
        if takes_uint8:
            images = ((images * std + mean) * 255).round().to(torch.uint8)
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return embed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--targets", nargs="+", required=True)
    asked = parser.parse_args()
    network, settings = trained_network(asked.checkpoint)
    targets = [load_dataset(target) for target in asked.targets]
    rows = {"network": network.embed} | {file: embedding(file, network.preprocessing) for file in asked.files}
    print("| | MB | " + " | ".join(f"{target.name} mAP | lost | R1" for target in targets) + " |")
    print("| --- | --- |" + " --- | --- | --- |" * len(targets))
    first: list[float] = []
    for name, embed in rows.items():
        size = f"{Path(name).stat().st_size / 1e6:.1f}" if name != "network" else ""
        scores = [
            evaluate_dataset(embed, target, tuple(settings["data"]["image_size"]), preprocessing=network.preprocessing)
            for target in targets
        ]
        first = first or [score.mAP for score in scores]
        cells = [
            f"{score.mAP:.2%} | {whole - score.mAP:+.2%} | {score.cmc[0]:.2%}"
            for score, whole in zip(scores, first, strict=True)
        ]
        print(f"| {Path(name).name} | {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
