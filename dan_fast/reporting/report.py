"""`dan-fast report`: runs beside the paper's tables and figures, as pictures and one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse.typing import NonNegativeInt
from torch import Tensor

from dan_fast.data import image_loader, load_dataset
from dan_fast.data.protocols import resolve_protocol
from dan_fast.data.samples import ReIDDataset, Sample
from dan_fast.errors import DanFastError
from dan_fast.reporting.comparisons import (
    GATES,
    METRICS,
    describe,
    evaluated_epochs,
    means,
    plot_gates,
    plot_models,
    plot_over_setting,
)
from dan_fast.reporting.curves import plot_curves
from dan_fast.reporting.groups import SYMBOLS, Line, models, swept_settings, targets, unlabeled_shares
from dan_fast.reporting.heatmaps import plot_attention
from dan_fast.reporting.html import Figure, Table, write_report
from dan_fast.reporting.memories import MEMORIES, Slots, neighbours_agree, plot_memories, sample, stored_slots
from dan_fast.reporting.results import contradictions_table, paper_tables, result_tables
from dan_fast.reporting.runs import Run, read_runs
from dan_fast.training.build import trained_network
from dan_fast.training.checkpoint import load_checkpoint

# t-SNE of more takes minutes and shows no more.
_MOST_SLOTS = 2000
_FLAT = 1e-6
_TOLD = {
    "train/loss/total": "L_total on S",
    "test/loss/total": "L_total on S~",
    "train/accuracy/attention": "accuracy of the attention branch",
    "train/accuracy/adversary": "accuracy of the adversary",
    "competition/backbone_frozen": "share of iterations with a frozen backbone",
    "memory/slots_labeled": "slots of M in use",
    "memory/slots_unlabeled": "slots of M′ in use",
    "pseudo/accuracy": "accuracy of the pseudo labels",
}


class _Missing(NamedTuple):
    """Something the page lacks: whose it is, what, and why and what to do about it."""

    run: str
    what: str
    why: str


def report(
    runs: Sequence[str | Path],
    out: str | Path = "runs/report",
    images: NonNegativeInt = 8,
    seed: NonNegativeInt = 0,
) -> Path:
    """Lay trainings beside the paper's Tables IV-VI and IX and Figs. 5(b) to 10, in one page with pictures.

    What a training lacks is said in the page.

    Args:
        runs: Folders of trainings, or folders of such folders.
        out: Folder for the page, index.html, and its pictures.
        images: Images under heat maps, of each training's first target; 0 leaves images of persons out.
        seed: Seed of t-SNE.

    Returns:
        The path of the page.

    Raises:
        DanFastError: a path is no folder of a training, or the page cannot be written.
    """
    found, out = read_runs(runs), Path(out)
    missing = [_Missing(run.name, "results", complaint) for run in found for complaint in run.complaints]
    missing += [
        _Missing(run.name, "results", "Not evaluated: let it train to its end with data.targets, or write "
                 "`dan-fast evaluate --out` into its folder.")
        for run in found
        if not run.results
    ]  # fmt: skip
    figures = _gates(found, out, missing)
    figures += _models(found, out, missing)
    figures += _shares(found, out, missing)
    figures += _swept(found, out, missing)
    for number, run in enumerate(found, 1):
        figures += _own_figures(run, out, f"{number:02d}", images, seed, missing)
    tables = [_overview(found), *result_tables(found), *paper_tables(found)]
    if missing:
        rows = [list(each) for each in missing]
        tables.append(Table("Not on this page", ["run", "what", "why, and what to do"], rows))
    tables.append(contradictions_table())
    return write_report(out, "dan_fast: runs beside the paper", _summary(found), tables, figures)


def _summary(runs: Sequence[Run]) -> str:
    places = targets(runs)
    tested = f"tested on {', '.join(places)}" if places else "not tested on anything yet"
    return (
        f"{len(runs)} training{'s' * (len(runs) != 1)}, {tested}, beside the figures that the paper prints "
        "(Liu, Zhang, Bhanu, Coleman, Kerr: Data Assimilation Network for Generalizable Person Re-identification, "
        "IEEE TCSVT 2022).\n\nResults are in percent and of the last epoch, unless the protocol beside them says "
        "otherwise."
    )


def _overview(runs: Sequence[Run]) -> Table:
    columns = ["run", "trained on", "tested on", "procedure", "network", "backbone", "epochs", "seed"]
    rows = [
        [
            run.name,
            run.sources,
            ", ".join(targets([run])) or "nothing yet",
            run.settings["meta"]["procedure"].upper(),
            run.model,
            run.settings["model"]["backbone"],
            run.settings["optimizer"]["epochs"],
            run.settings["run"]["seed"],
        ]
        for run in runs
    ]
    return Table("Runs", columns, rows, "Networks are named as in Fig. 6; r is the dimension reduction ratio.")


def _gates(runs: Sequence[Run], out: Path, missing: list[_Missing]) -> list[Figure]:
    shown = [run for run in runs if any(tag in run.scalars for tag in GATES)]
    for run in runs:
        if run not in shown:
            why = "It has no memory, as it was trained without unlabelled images."
            missing.append(_Missing(run.name, "gates, Fig. 5(b)", why if not run.unlabeled else _no_scalars(run)))
    if not shown:
        return []
    path = plot_gates(shown, out / "gates.png")
    parts = []
    for run in shown:
        ends = [
            f"{title.split(',')[0]} from {run.scalars[tag][1][0]:.3f} to {run.scalars[tag][1][-1]:.3f}"
            for tag, title in GATES.items()
            if tag in run.scalars
        ]
        parts.append(f"{run.name}: {', '.join(ends)}")
    caption = "Gates over the iterations, first to last value. " + ". ".join(parts) + "."
    return [Figure("Gates of the memories (Fig. 5(b))", path, caption)]


def _models(runs: Sequence[Run], out: Path, missing: list[_Missing]) -> list[Figure]:
    figures = []
    for number, line in enumerate(models(runs), 1):
        members = [run for each in line.points.values() for run in each]
        over_epochs = any(len(epochs) > 1 for run in members for epochs, _ in evaluated_epochs(run).values())
        if not over_epochs and not targets(members):
            continue
        path = plot_models(line, out / f"models{number}.png")
        how = "mAP over the epochs" if over_epochs else "R1 and mAP after the last epoch"
        caption = f"{how} for each network{_of(line)}. {_all_means(line, str)}"
        figures.append(Figure("Attention and adversary (Fig. 6)", path, caption))
    if not figures:
        why = "No two tested runs differ in attention or adversary alone: `dan-fast sweep --grid fig6` trains such."
        missing.append(_Missing("all", "Fig. 6", why))
    return figures


def _shares(runs: Sequence[Run], out: Path, missing: list[_Missing]) -> list[Figure]:
    lines = _tested(unlabeled_shares(runs))
    if not lines:
        why = "No two tested runs differ in data.unlabeled_share alone: `dan-fast sweep --grid fig7` trains such."
        missing.append(_Missing("all", "Fig. 7", why))
        return []
    label = "share p of the unlabelled images (%)"
    path = plot_over_setting(lines, label, out / "unlabeled_share.png", percent=True)
    words = " ".join(
        f"{_of(line)} {_all_means(line, lambda share: f'p = {100 * share:g} %')}".strip() for line in lines
    )
    caption = f"R1 (dashed) and mAP (solid) over the share of the unlabelled images. {words}"
    return [Figure("Share of unlabelled images (Fig. 7)", path, caption)]


def _swept(runs: Sequence[Run], out: Path, missing: list[_Missing]) -> list[Figure]:
    figures = []
    for name, all_lines in swept_settings(runs).items():
        if lines := _tested(all_lines):
            label = f"{SYMBOLS[name]}, {name}" if name in SYMBOLS else name
            path = plot_over_setting(lines, label, out / f"over_{name}.png")
            words = " ".join(f"{_of(line)} {_all_means(line, str)}".strip() for line in lines)
            caption = f"R1 (dashed) and mAP (solid) over {label}. {words}"
            figures.append(Figure(f"Over {label} (Fig. 8)", path, caption))
    if not figures:
        why = "No two tested runs differ in one number alone: `dan-fast sweep --grid fig8` trains such."
        missing.append(_Missing("all", "Fig. 8", why))
    return figures


def _own_figures(run: Run, out: Path, stem: str, images: int, seed: int, missing: list[_Missing]) -> list[Figure]:
    """Curves, heat maps and t-SNE of one run."""
    figures = []
    if run.scalars:
        path = plot_curves(run.folder, out / f"{stem}_curves.png")
        figures.append(Figure(f"Training of {run.name}", path, _from_to(run)))
    else:
        missing.append(_Missing(run.name, "curves", _no_scalars(run)))
    try:
        state = load_checkpoint(run.checkpoint)
    except DanFastError as error:
        missing.append(_Missing(run.name, "heat maps and t-SNE, Figs. 9 and 10", str(error)))
        return figures
    figures += _heat_maps(run, out / f"{stem}_attention.png", images, missing)
    slots = stored_slots(state)
    if slots is None:
        why = "It has no memory, as it was trained without unlabelled images."
        missing.append(_Missing(run.name, "t-SNE, Fig. 10", why))
        return figures
    done = f"after {state['epoch']} epochs{f' and {iteration} iterations' if (iteration := state['iteration']) else ''}"
    shown = {memory: sample(each, _MOST_SLOTS, seed) for memory, each in slots.items()}
    contents = "; ".join(
        f"{title.split(',')[0]}: {slots[memory].describe()}{_agreement(shown[memory])}"
        for memory, title in MEMORIES.items()
    )
    drawn = f" Of a memory with more than {_MOST_SLOTS} slots in use that many are drawn, at random."
    caption = (
        f"t-SNE (seed {seed}, of features of unit length) of what the memories hold {done}: {contents}."
        f"{drawn if any(len(slots[each].labels) > _MOST_SLOTS for each in slots) else ''} Slots of one colour and "
        "shape have the same label, in M′ the same pseudo label; distances between groups mean nothing."
    )
    try:
        path = plot_memories(shown, out / f"{stem}_memories.png", seed)
    except ValueError as error:
        missing.append(_Missing(run.name, "t-SNE, Fig. 10", str(error)))
        return figures
    return [*figures, Figure(f"Memories of {run.name} (Fig. 10)", path, caption)]


def _agreement(slots: Slots) -> str:
    share = neighbours_agree(slots)
    return "" if share is None else f", {100 * share:.0f} % of them nearest to one of the same label"


def _from_to(run: Run) -> str:
    """What a run logged, in words: the first and the last value of what matters most."""
    told = [
        f"{title} from {run.scalars[tag][1][0]:.3g} to {run.scalars[tag][1][-1]:.3g}"
        for tag, title in _TOLD.items()
        if tag in run.scalars and (run.settings["model"]["adversary"] or "adversary" not in tag)
    ]
    return f"All that the run logged, over its iterations; first to last value: {', '.join(told) or 'none'}."


def _heat_maps(run: Run, path: Path, images: int, missing: list[_Missing]) -> list[Figure]:
    what = "heat maps, Fig. 9"
    if images == 0:
        missing.append(_Missing(run.name, what, "Images of persons were left out by --images 0."))
        return []
    if run.settings["model"]["attention"] == "none":
        missing.append(_Missing(run.name, what, "Its network has no attention."))
        return []
    try:
        name, samples = _images_of(run, images)
        network, _ = trained_network(run.checkpoint)
        pixels, _ = next(iter(image_loader(samples, network.image_size, batch_size=len(samples))))
        with torch.inference_mode():
            attention: Tensor = network(pixels).spatial_attention
        plot_attention(pixels, attention, network.map_size, path)
    except (DanFastError, ValueError, RuntimeError) as error:
        missing.append(_Missing(run.name, what, str(error)))
        return []
    spread = (attention.amax(1) - attention.amin(1)).tolist()
    caption = (
        f"Spatial attention A_S of {run.name} over {len(samples)} images of {name}, each beside its original. Colours "
        f"span each image's own range, written above it: from {min(spread):.1e} to {max(spread):.1e} wide."
        f"{' That is flat: colours show little but rounding.' if max(spread) < _FLAT else ''}"
    )
    return [Figure(f"Attention of {run.name} (Fig. 9)", path, caption)]


def _images_of(run: Run, count: int) -> tuple[str, list[Sample]]:
    """Images spread evenly over the run's first dataset that is still there: the same for runs with the same one."""
    data = run.settings["data"]
    readers: list[Callable[[], ReIDDataset]]
    if data["protocol"]:
        readers = [lambda: resolve_protocol(data["protocol"], data["root"], targets_only=True).targets[0]]
    else:
        readers = [partial(load_dataset, path) for path in (*data["targets"], *data["labeled"])]
    reasons = []
    for read in readers:
        try:
            dataset = read()
        except DanFastError as error:
            reasons.append(str(error))
            continue
        samples = dataset.query or dataset.test or dataset.train
        if samples:
            return dataset.name, list(samples[:: max(1, len(samples) // count)][:count])
    raise DanFastError(f"None of its datasets can be read: {reasons[0] if reasons else 'it names none.'}")


def _tested(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if targets([run for each in line.points.values() for run in each])]


def _of(line: Line) -> str:
    return f" ({line.label})" if line.label else ""


def _all_means(line: Line, show: Callable[[object], str]) -> str:
    """R1 and mAP of a line on every target in words."""
    runs = [run for each in line.points.values() for run in each]
    parts = [
        f"{metric} on {target}: {describe(means(line, target, metric), show)}."
        for target in targets(runs)
        for metric in METRICS
    ]
    return " ".join(parts)


def _no_scalars(run: Run) -> str:
    return f"{run.folder / 'tensorboard'} holds no such scalars: the run has logged nothing of the kind."
