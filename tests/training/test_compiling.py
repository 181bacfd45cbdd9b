"""A compiled backbone: when it is taken, what a run says of it, and that it is left out where it does not serve."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from dan_fast.core.errors import DanFastError, Interrupted
from dan_fast.daml import Stage
from dan_fast.training import Trainer, compiling
from dan_fast.training.compiling import CompiledWhereFaster
from tests.support.steps import decide, split, tiny_step
from tests.support.training_runs import assert_same_training, config, snapshot, stop_after

ITERATIONS = 20


def run(compiled: CompiledWhereFaster, iterations: int = ITERATIONS, seconds: tuple = (2, 1)) -> list[bool]:
    """Whether each iteration was compiled; without it and with it they seem to take so many seconds."""
    now, took, step = [0.0], [], compiled._step.step

    def timed(*batch):
        took.append(compiled._backbone._compiled_call_impl is not None)
        now[0] += seconds[took[-1]]
        return step(*batch)

    compiled._step.step, compiled._now = timed, lambda: now[0]
    for seed in range(iterations):
        compiled.step(split(seed), split(seed + 100))
        assert compiled._backbone._compiled_call_impl is None
    return took


def plain(iterations: int = ITERATIONS) -> dict[str, torch.Tensor]:
    """The weights of the same iterations without `CompiledWhereFaster`."""
    step = tiny_step()
    for seed in range(iterations):
        step.step(split(seed), split(seed + 100))
    return snapshot(step.model)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("faster", [True, False])
def test_after_pairs_of_iterations_what_was_faster_is_kept_and_both_learn_the_same(faster):
    step, said = tiny_step(), []
    compiled = CompiledWhereFaster(step, wanted=True)
    compiled.say = said.append
    assert run(compiled, seconds=(2, 1 if faster else 3)) == [False, False, *[False, True] * 8, faster, faster]
    figures = f"{1 if faster else 3}.000 s an iteration compiled, 2.000 s without."
    assert said == ["Compiling the backbone.", compiled.outcome]
    assert compiled.outcome == f"The backbone is {'compiled' if faster else 'not compiled'}: {figures}"
    torch.testing.assert_close(snapshot(step.model), plain())


def refused(backbone: nn.Module, **_: object) -> None:
    raise RuntimeError("no compiler\nand more")


def wrong(backbone: nn.Module, **_: object) -> None:
    backbone._compiled_call_impl = lambda images: 1.1 * backbone._call_impl(images)


@pytest.mark.parametrize(
    ("compiler", "sentence"),
    [
        (refused, "torch.compile failed (RuntimeError: no compiler)"),
        (wrong, "its features differ by 1.0e-01 of their norm, more than 1e-03"),
    ],
)
def test_what_fails_or_disagrees_is_left_out_and_changes_no_bit(compiler, sentence):
    step = tiny_step()
    compiled = CompiledWhereFaster(step, wanted=True)
    step.model.network.backbone.compile = partial(compiler, step.model.network.backbone)
    assert not any(run(compiled))
    assert compiled.outcome == f"The backbone is not compiled: {sentence}."
    torch.testing.assert_close(snapshot(step.model), plain(), rtol=0, atol=0)


@pytest.mark.parametrize("procedure", ["daml2", "daml3"])
def test_every_kind_of_pass_is_compiled_in_the_trial(procedure):
    """A compiler makes code of its own for tensors that are parameters, have a gradient or have none."""
    step, kinds = tiny_step(procedure=procedure), []
    backbone = step.model.network.backbone

    def kind_of_pass(images: torch.Tensor) -> torch.Tensor:
        weight = backbone.conv.weight
        kinds.append((type(weight), weight.requires_grad, torch.is_grad_enabled()))
        return backbone._call_impl(images)

    backbone.compile = lambda **_: setattr(backbone, "_compiled_call_impl", kind_of_pass)
    decide(step, *[Stage.ADVERSARY, Stage.ADVERSARY, Stage.BOTH, Stage.BOTH, Stage.ATTENTION] * 4)
    compiled = CompiledWhereFaster(step, wanted=True)
    run(compiled, 3)
    in_trial = set(kinds)
    kinds.clear()
    run(compiled, 17)
    assert in_trial == set(kinds) and len(in_trial) == (3 if procedure == "daml3" else 2)


@pytest.mark.compile
@pytest.mark.slow
def test_without_a_compiler_it_goes_on_without(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    torch.compiler.reset()
    compiled = CompiledWhereFaster(tiny_step(), wanted=True)
    assert not any(run(compiled, 4))
    assert compiled.outcome.startswith("The backbone is not compiled: torch.compile failed (")


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [({"meta": {"order": 2}}, "second derivatives"), ({"model": {"gradient_checkpointing": True}}, "computed again")],
)
def test_what_cannot_be_compiled_is_refused_before_anything_is_written(tmp_path, sections, sentence):
    with pytest.raises(DanFastError, match=sentence):
        Trainer(config(tmp_path / "none", tmp_path / "out", run={"compile": True}, **sections))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_results_record_what_was_taken_and_a_run_goes_on_with_and_without(images: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(compiling, "_WARM_UP", 0)
    monkeypatch.setattr(compiling, "_PAIRS", 1)
    # Nothing but its name: a compiled backbone that gives the same bits.
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", self._call_impl))
    of = partial(config, images, data={"targets": [str(images / "mall")], "unlabeled": []})
    Trainer(of(tmp_path / "plain")).fit()
    trainer = Trainer(of(tmp_path / "mixed", run={"compile": True}))
    stop_after(trainer, 3)
    with pytest.raises(Interrupted):
        trainer.fit()
    Trainer(of(tmp_path / "mixed", run={"resume": True})).fit()
    assert_same_training(tmp_path / "plain", tmp_path / "mixed")
    Trainer(of(tmp_path / "compiled", run={"compile": True})).fit()
    results = {name: json.loads((tmp_path / name / "results.json").read_text()) for name in ("plain", "compiled")}
    assert "compiled" not in results["plain"] and "s an iteration compiled" in results["compiled"]["compiled"]
    assert results["plain"]["targets"] == results["compiled"]["targets"]
    # A finished run that is tested on other targets still says which was taken.
    again = Trainer(of(tmp_path / "compiled", run={"compile": True, "resume": True}))
    assert again._compiled.outcome == results["compiled"]["compiled"]
