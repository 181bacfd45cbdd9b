"""Random sequences of mini-batches, both memories carried along, against the literal reference."""

import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dan_fast import MemoryState, functional, reference
from dan_fast.core.types import Gates, MemoryBatch
from tests.support.examples import examples
from tests.support.memory_problems import (
    KINDS,
    Calls,
    Closeness,
    agree,
    closest_call,
    closest_calls,
    in_dtype,
    module_of,
    problems,
)


def assert_same_decisions(actual, expected):
    for name in ("labels", "sample_ids", "least_used"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), f"{name} are others"


def magnified(cancellation, least):
    """By how much rounding grows where a slot was nearly cancelled: its square norm is what two larger ones leave."""
    return max(1.0, least / cancellation) ** 2 if cancellation > 0 else math.inf


class Excuses:
    """What of a batch may be wrong: what depends on a decision that was closer than `usage` or `cosine`, and no more.

    M depends on its own writes, a pseudo label on M, and on these M', the loss and its gradients. Whether the decision
    was taken otherwise cannot be seen: two samples of a label may have changed places.

    Attributes:
        used: whether something was wrong and excused.
    """

    def __init__(self, calls, usage, cosine):
        self.calls, self.usage, self.cosine, self.used = calls, usage, cosine, False

    def labeled(self):
        """For assertions on M."""
        return self._unless(self.calls.labeled.usage < self.usage)

    def pseudo_labels(self, actual, expected):
        with self._unless(False):
            differ = (actual != expected).tolist()
            wrong = [at for at, other in enumerate(differ) if other and not self.calls.retrieval[at] < self.cosine]
            assert not wrong, f"pseudo labels {wrong} are others, and the choices were not close"
            self.used |= any(differ)

    def rest(self):
        """For assertions on M', the loss and gradients."""
        unlabeled = self.calls.unlabeled
        return self._unless(unlabeled.usage < self.usage or unlabeled.cosine < self.cosine)

    @contextmanager
    def _unless(self, close):
        try:
            yield
        except AssertionError:
            # What follows from something excused is excused too.
            if not close and not self.used:
                raise
            self.used = True


def assert_states_agree(actual, expected, tolerance=1e-10):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and not a.requires_grad
        agree(a, b, tolerance)


def assert_sums_agree(actual, expected, tolerance):
    """Whichever slots were written, M's usage has grown by the same sum, and its evaluation adds up to 1."""
    for name in ("usage", "evaluation"):
        agree(getattr(actual, name).double().sum(), getattr(expected, name).sum(), tolerance)


def leaves(batch, gates):
    keys = [x.clone().requires_grad_() for x in (batch.keys, batch.unlabeled_keys)]
    return [*keys, *(torch.tensor(gate, dtype=torch.float64).requires_grad_() for gate in gates[:3])]


def run(impl, states, batch, inputs, gates):
    """`inputs` replace the keys of the batch and the values of the gates."""
    return impl.memory_step(*states, inputs[0], batch.labels, inputs[1], batch.sample_ids, *inputs[2:], *gates[3:])


def rounding_of_slopes(batch, *states):
    """What rounding may leave in a gradient: of a short vector the cosine has a steep slope, and much cancels."""
    vectors = torch.cat([batch.keys, batch.unlabeled_keys, *(state.features[state.occupied] for state in states)])
    shortest = vectors.norm(dim=1).min().item() if len(vectors) else 1.0
    return 1e-14 / max(shortest, 1e-12)


def assert_gradients_agree(loss, inputs, literal_loss, literal_inputs, floor):
    actual, expected = torch.autograd.grad(loss, inputs), torch.autograd.grad(literal_loss, literal_inputs)
    steepest = max((x.abs().max().item() for x in expected if x.numel()), default=0.0)
    agree(actual, expected, 1e-10, floor=floor + 1e-14 * steepest)


def count_what_was_reached(reached, problem, states, batch, step):
    labeled, unlabeled = states
    reached["batches"] += 1
    reached["samples"] += len(batch.labels) + len(batch.sample_ids)
    reached["cleared"] += bool(((unlabeled.labels >= 0) & (step.unlabeled.labels < 0)).any())
    reached["skipped"] += bool((step.pseudo_labels < 0).any())
    for state, name in ((labeled, "M"), (unlabeled, "M'")):
        filled = int(state.occupied.sum())
        fill = "full" if filled == len(state.labels) else "part" if filled else "empty"
        reached[f"{name} {fill}"] += 1
        reached[f"{name} one slot"] += len(state.labels) == 1
    reached["smaller than the batch"] += len(labeled.labels) < len(batch.labels)
    reached["scalar keys"] += problem.d == 1
    counts = unlabeled.labels[unlabeled.occupied].bincount() if unlabeled.occupied.any() else torch.zeros(1)
    reached["more of a label than others"] += 0 < int(counts.sum() - counts.max()) < int(counts.max())
    reached["no labelled"] += len(batch.labels) == 0
    reached["no unlabelled"] += len(batch.sample_ids) == 0
    reached[problem.kind] += 1


def assert_enough_was_reached(reached, least=3):
    events = "cleared, skipped, smaller than the batch, scalar keys, more of a label than others"
    fills = [f"{name} {fill}" for name in ("M", "M'") for fill in ("empty", "part", "full", "one slot")]
    names = [*KINDS, *events.split(", "), *fills, "no labelled", "no unlabelled"]
    assert not {name: reached[name] for name in names if reached[name] < least}
    assert reached["excused"] <= 0.02 * reached["batches"]


def test_only_what_follows_from_a_close_call_may_differ():
    empty = [MemoryState.empty(3, 2, torch.float64) for _ in range(2)]
    batch = MemoryBatch(torch.eye(2).double(), torch.tensor([4, 5]), torch.eye(2).double(), torch.tensor([0, 1]))
    step = run(reference, empty, batch, leaves(batch, Gates(0.0, 0.0, 0.3)), Gates(0.0, 0.0, 0.3))
    assert step.pseudo_labels.tolist() == [4, 5]
    far, near = Closeness(1.0, 1.0, 1.0), Closeness(0.0, math.inf, 1.0)

    def excused(other, labeled=far, retrieval=(1.0, 1.0), unlabeled=far):
        excuses = Excuses(Calls(labeled, list(retrieval), unlabeled), 1e-5, 1e-5)
        with excuses.labeled():
            assert_same_decisions(other.labeled, step.labeled)
            assert_states_agree(other.labeled, step.labeled)
        excuses.pseudo_labels(other.pseudo_labels, step.pseudo_labels)
        with excuses.rest():
            assert_same_decisions(other.unlabeled, step.unlabeled)
            agree(other.loss, step.loss)
        return excuses.used

    other_slot = step._replace(labeled=step.labeled._replace(least_used=step.labeled.least_used + 1))
    other_usage = step._replace(labeled=step.labeled._replace(usage=step.labeled.usage + 1e-6))
    other_label = step._replace(pseudo_labels=torch.tensor([4, 4]), loss=step.loss + 1)
    other_sets = step._replace(unlabeled=step.unlabeled._replace(labels=torch.tensor([4, -1, -1])))
    other_loss = step._replace(loss=step.loss + 1e-6)
    assert not excused(step) and not excused(step, near, (0.0, 0.0), near)
    for other in (other_slot, other_usage):
        assert excused(other, labeled=near)
        with pytest.raises(AssertionError):
            excused(other, retrieval=(0.0, 0.0), unlabeled=near)
    assert excused(other_label, retrieval=(1.0, 0.0))
    with pytest.raises(AssertionError, match="not close"):
        excused(other_label, near, (0.0, 1.0), near)
    for other in (other_sets, other_loss):
        assert excused(other, unlabeled=near)
        with pytest.raises(AssertionError):
            excused(other, near, (0.0, 0.0))


@pytest.mark.slow
def test_sequences_agree_in_float64():
    reached = Counter()

    @examples(250)
    @given(problem=problems())
    def check(problem):
        states = {impl: problem.start() for impl in (reference, functional)}
        for at, batch in enumerate(problem.batches()):
            inputs = {impl: leaves(batch, problem.gates) for impl in states}
            steps = {impl: run(impl, states[impl], batch, inputs[impl], problem.gates) for impl in states}
            literal, fast = steps[reference], steps[functional]
            count_what_was_reached(reached, problem, states[reference], batch, literal)
            calls = closest_calls(states[reference], batch, problem.gates)
            cancelled = calls.labeled.cancellation, min(calls.labeled.cancellation, calls.unlabeled.cancellation)
            slack = [magnified(each, 2e-3) for each in cancelled]
            reached["magnified"] += slack[1] > 1
            assert_sums_agree(fast.labeled, literal.labeled, 1e-10)

            excuses = Excuses(calls, 1e-13 * slack[1], 1e-14 * slack[1])
            with excuses.labeled():
                assert_same_decisions(fast.labeled, literal.labeled)
                assert_states_agree(fast.labeled, literal.labeled, 1e-10 * slack[0])
            excuses.pseudo_labels(fast.pseudo_labels, literal.pseudo_labels)
            with excuses.rest():
                assert_same_decisions(fast.unlabeled, literal.unlabeled)
                agree(fast.loss, literal.loss, 1e-10 * slack[1])
                assert_states_agree(fast.unlabeled, literal.unlabeled, 1e-10 * slack[1])
                if at % 2 == 0:
                    floor = rounding_of_slopes(batch, *literal[2:]) * slack[1]
                    assert_gradients_agree(fast.loss, inputs[functional], literal.loss, inputs[reference], floor)
            if not excuses.used:
                states = {impl: [step.labeled, step.unlabeled] for impl, step in steps.items()}
            else:
                reached["excused"] += 1
                states = {impl: [literal.labeled, literal.unlabeled] for impl in states}

    check()
    assert_enough_was_reached(reached)


@pytest.mark.slow
@examples(18)
@given(problem=problems(max_slots=17, max_dim=6, counts=(4, 14)), data=st.data())
def test_the_module_agrees_whenever_it_is_looked_at(problem, data):
    """Writes may wait; nothing that looks at the memory, and no late backward pass, may see another."""
    states, waiting, steps, snapshots = problem.start(), [], [], []
    gates = problem.gates._replace(beta=0.95 if problem.gates.beta else 1e-13)
    memory = module_of(states, gates)
    for batch in problem.batches():
        closest = closest_call(states, batch, gates)
        if closest.usage < 1e-13 or closest.cosine < 1e-14 or closest.cancellation < 2e-3:
            break  # rounding may decide this batch, and no later one could be compared
        inputs = [x.clone().requires_grad_() for x in (batch.keys, batch.unlabeled_keys)]
        fast = memory(inputs[0], batch.labels, inputs[1], batch.sample_ids)
        expected_inputs = leaves(batch, gates)
        literal = run(reference, states, batch, expected_inputs, gates)
        assert torch.equal(fast.pseudo_labels, literal.pseudo_labels)
        agree(fast.loss, literal.loss)
        states = [literal.labeled, literal.unlabeled]
        parameters = [memory.alpha, memory.alpha_unlabeled]
        floor = rounding_of_slopes(batch, *states)
        waiting.append((fast.loss, [*inputs, *parameters], literal.loss, expected_inputs[:4], floor))
        steps.append((fast, literal))
        match data.draw(st.sampled_from(["wait", "wait", "labeled", "unlabeled", "settle", "state dict", "backward"])):
            case "labeled":
                looked = memory.labeled
                assert_states_agree(looked, literal.labeled)
                snapshots.append((looked, [x.clone() for x in looked]))
            case "unlabeled":
                assert_states_agree(fast.unlabeled, literal.unlabeled)
            case "settle":
                memory.settle()
            case "state dict":
                # The graphs that wait were made with the parameters of the old module.
                saved, memory = memory.state_dict(), module_of(problem.start(), gates)
                memory.load_state_dict(saved)
            case "backward":
                at = data.draw(st.integers(0, len(waiting) - 1))
                assert_gradients_agree(*waiting.pop(at))
    assert_states_agree(memory.labeled, states[0])
    assert_states_agree(memory.unlabeled, states[1])
    for graphs in waiting[::2]:
        assert_gradients_agree(*graphs)
    for looked, then in snapshots:
        assert all(map(torch.equal, looked, then)), "a later batch was written into a state that was read"
    for fast, literal in steps[::3]:
        assert_states_agree(fast.labeled, literal.labeled)
        assert_states_agree(fast.unlabeled, literal.unlabeled)


def assert_memory_is_rounded(memory, exact, unit, magnification, cancellation):
    """The same decisions, and the exact numbers rounded once; `cancellation` is what two larger numbers may leave."""
    assert_same_decisions(memory, exact)
    agree(memory.usage, exact.usage, 1e-5 * magnification)
    agree(memory.evaluation, exact.evaluation, 1e-5 * magnification)
    error = (memory.features.double() - exact.features).abs()
    rounded = 1.01 * unit * exact.features.abs().clamp(min=torch.finfo(memory.features.dtype).smallest_normal)
    largest = exact.features.abs().max().item() / max(cancellation, 1e-12)
    assert (error <= rounded + 1e-6 * largest).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str
)
def test_lower_precision_agrees_step_by_step(dtype, unit):
    """From a common state each time: what is stored is the exact result rounded once."""
    reached = Counter()

    @examples(50)
    @given(problem=problems(counts=(2, 4)))
    def check(problem):
        # In float32 sigmoid(30) is 1, and nothing is left for the least-used slot.
        problem = replace(problem, values=tuple(min(value, 2.0) for value in problem.values))
        states = [state._replace(features=0.1 * state.features) for state in problem.start()]
        for batch in problem.batches():
            # Sums of keys of length 1e4 would overflow float16.
            keys = [(0.1 * x).to(dtype).requires_grad_() for x in (batch.keys, batch.unlabeled_keys)]
            states = [in_dtype(in_dtype(state, dtype), torch.float64) for state in states]
            batch = batch._replace(keys=keys[0].detach().double(), unlabeled_keys=keys[1].detach().double())
            inputs = leaves(batch, problem.gates)
            exact = run(reference, states, batch, inputs, problem.gates)
            given_states = [in_dtype(state, dtype) for state in states]
            before, states = states, [exact.labeled, exact.unlabeled]
            calls = closest_calls(before, batch, problem.gates, ties_hold=False)
            cancelled = calls.labeled.cancellation, min(calls.labeled.cancellation, calls.unlabeled.cancellation)
            slack = [magnified(each, 0.02) for each in cancelled]
            exact_gradients = torch.autograd.grad(exact.loss, inputs[:2])
            steepest = max((x.abs().max().item() for x in exact_gradients if x.numel()), default=0.0)
            slopes = 5e7 * rounding_of_slopes(batch, *before, *states) * slack[1]
            for impl in (functional, reference):
                step = run(impl, given_states, batch, [*keys, *problem.values], problem.gates)
                gradients = torch.autograd.grad(step.loss, keys)
                assert step.loss.dtype == torch.float32 and step.pseudo_labels.dtype == torch.int64
                for memory in step[2:]:
                    assert memory.features.dtype == dtype and memory.usage.dtype == torch.float32
                    assert all(x.isfinite().all() for x in memory)
                assert step.loss.isfinite() and all(a.dtype == dtype and not a.isnan().any() for a in gradients)
                assert_sums_agree(step.labeled, exact.labeled, 1e-5)

                excuses = Excuses(calls, 1e-5 * slack[1], 1e-5 * slack[1])
                with excuses.labeled():
                    assert_memory_is_rounded(step.labeled, exact.labeled, unit, slack[0], cancelled[0])
                excuses.pseudo_labels(step.pseudo_labels, exact.pseudo_labels)
                with excuses.rest():
                    assert_memory_is_rounded(step.unlabeled, exact.unlabeled, unit, slack[1], cancelled[1])
                    agree(step.loss, exact.loss, 2e-5 * slack[1])
                    for a, b in zip(gradients, exact_gradients, strict=True):
                        # Beside a zero vector the slope is 1e12, more than float16 holds.
                        a, b = (x.double().clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max) for x in (a, b))
                        agree(a, b, 1e-5 + unit, floor=1e-4 * steepest + slopes)
                reached["batches"] += 1
                reached["excused"] += excuses.used

    check()
    assert reached["excused"] <= 0.1 * reached["batches"]
