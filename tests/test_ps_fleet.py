"""The fleet: who is admitted, who may be chosen, and what a plan is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mergesfl.control.estimates import Estimates
from mergesfl.control.fleet import FleetView, WorkerView
from mergesfl.control.plan import RoundPlan
from mergesfl.errors import RemoteProtocolError
from mergesfl.protocol.session import Role, Session
from ps.fleet import Fleet, Member
from ps.outcome import RoundOutcome, WorkerSeconds
from tests.memory_cluster import CLASS_NAMES, SAMPLE_SHAPE, registration


def new_fleet() -> Fleet:
    return Fleet(CLASS_NAMES, SAMPLE_SHAPE, Estimates(0.5), max_workers=4)


def admit(fleet: Fleet, worker_id: str, label_counts: tuple[int, ...] = (1, 1, 1), ready: bool = True) -> Member:
    member = fleet.admit(worker_id.encode(), registration(worker_id, label_counts), Session(Role.SERVER))
    if ready:
        fleet.get_ready(member)
    return member


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ((2, 0, 3), (2, 0, 3)),
        ((2,), (2, 0, 0)),  # labels that it never saw at the end may be missing
        ((), (0, 0, 0)),
        ((1, 1, 1, 0, 0), (1, 1, 1)),  # more names than the run has, but no sample of them
    ],
)
def test_label_counts_have_one_entry_per_class_of_the_run(sent: tuple[int, ...], kept: tuple[int, ...]) -> None:
    fleet = new_fleet()
    member = admit(fleet, "a", sent)
    assert member.label_counts == fleet.known_label_counts["a"] == kept
    assert member.num_samples == sum(sent)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sample_shape": (3, 8, 8)}, "holds samples of shape (3, 8, 8), this run is for (1, 8, 8)"),
        ({"label_counts": (1, 1, 1, 2)}, "holds samples of class '3', this run knows the 3 classes 0, 1, 2: start it"),
        ({"class_names": ("0", "2", "bed")}, "holds samples of class 'bed', this run knows the 3 classes 0, 1, 2"),
        ({"class_names": ("0", "1")}, "counts 3 labels under 2 names, 2 of them distinct"),
        ({"class_names": ("0", "1", "1")}, "counts 3 labels under 3 names, 2 of them distinct"),
        ({"num_samples": 4}, "holds 4 samples but counts 3 labels"),
        (
            {"label_counts": (1 << 29, 1, 1), "num_samples": (1 << 29) + 2},
            "holds 536870914 samples, the limit is 536870912: give it a smaller share of the data",
        ),
    ],
)
def test_a_worker_that_does_not_fit_is_not_admitted(changes: dict[str, Any], expected: str) -> None:
    fleet = new_fleet()
    with pytest.raises(RemoteProtocolError) as caught:
        fleet.admit(b"p", registration("a", **({"label_counts": (1, 1, 1)} | changes)), Session(Role.SERVER))
    assert f"worker 'a' {expected}" in str(caught.value)
    assert (fleet.by_id, fleet.by_peer, fleet.known_label_counts) == ({}, {}, {})


def test_label_counts_are_matched_by_name() -> None:
    """The run knows bed, cat, zero; this worker's labels are 0 = zero, 1 = cat, 2 = owl (none of it)."""
    fleet = Fleet(("bed", "cat", "zero"), SAMPLE_SHAPE, Estimates(0.5), max_workers=4)
    message = registration("a", (5, 2, 0), class_names=("zero", "cat", "owl"))
    member = fleet.admit(b"a", message, Session(Role.SERVER))
    assert member.label_counts == (0, 2, 5)


def test_labels_count_once_a_worker_is_ready() -> None:
    fleet = new_fleet()
    admit(fleet, "a", (1, 1, 0))
    talker = admit(fleet, "b", (0, 0, 9), ready=False)
    assert fleet.view(512).reference_distribution == (0.5, 0.5, 0.0)
    fleet.remove(talker, "left")
    assert fleet.state_dict()["known_label_counts"] == {"a": [1, 1, 0]}


def test_the_number_of_ids_is_bounded_and_those_that_are_known_may_come_back() -> None:
    fleet = new_fleet()  # of at most 4
    waiting = admit(fleet, "waiting", ready=False)
    for name in "abcd":
        fleet.remove(admit(fleet, name), "left")
    expected = "4 different worker ids have taken part in this run, the limit is 4 "
    with pytest.raises(RemoteProtocolError, match=expected):
        admit(fleet, "e")
    with pytest.raises(RemoteProtocolError, match=expected):
        fleet.get_ready(waiting)
    admit(fleet, "a", (0, 0, 1))
    assert len(fleet.known_label_counts) == 4
    assert fleet.known_label_counts["a"] == (0, 0, 1)


def test_only_ready_workers_that_are_heard_are_available_in_order_of_their_names() -> None:
    fleet = new_fleet()
    for name in ("c", "a", "b", "d"):
        admit(fleet, name, ready=name != "d")
    fleet.by_id["b"].silent = True
    assert [member.worker_id for member in fleet.available()] == ["a", "c"]
    fleet.by_id["b"].silent = False
    assert [member.worker_id for member in fleet.available()] == ["a", "b", "c"]


def test_who_is_ready_is_counted_without_looking_at_each() -> None:
    fleet = new_fleet()
    members = {name: admit(fleet, name, ready=name != "d") for name in "abcd"}
    assert (fleet.num_ready, fleet.num_not_ready) == (3, 1)
    members["b"].silent = True  # ready all the same
    assert (fleet.num_ready, len(fleet.available())) == (3, 2)
    fleet.remove(members["a"], "left")
    fleet.get_ready(members["d"])
    assert (fleet.num_ready, fleet.num_not_ready) == (3, 0)
    successor = fleet.admit(b"another peer", registration("c", (1, 1, 1)), Session(Role.SERVER))
    fleet.remove(members["c"], "replaced")
    assert (fleet.num_ready, fleet.num_not_ready) == (2, 1)
    fleet.remove(successor, "left")
    assert (fleet.num_ready, fleet.num_not_ready) == (2, 0)


def test_the_view_holds_what_was_observed_and_the_reference_of_all_ever_seen() -> None:
    """Phi_0 by hand: V_a = (1/2, 1/2, 0), V_b = (0, 0, 1), none of c; the mean of two is (1/4, 1/4, 1/2). b is away."""
    fleet = new_fleet()
    admit(fleet, "a", (2, 2, 0))
    gone = admit(fleet, "b", (0, 0, 3))
    admit(fleet, "c", ())
    fleet.remove(gone, "left")
    fleet.estimates.observe("a", 0.25, 0.5)
    fleet.estimates.observe("a", 0.75, 0.5)  # alpha 0.5: (0.25 + 0.75) / 2
    fleet.finished(["a", "b"])
    fleet.finished(["a"])
    assert fleet.view(512) == FleetView(
        (WorkerView("a", 4, (2, 2, 0), 0.5, 0.5, 2), WorkerView("c", 0, (0, 0, 0), None, None, 0)),
        512,
        (0.25, 0.25, 0.5),
    )


def test_both_time_models_learn_and_one_is_planned_with() -> None:
    """Steps of 4 and 8 samples take 4 * (0.25 + 0.5) = 3 and 8 * (0.125 + 0.5) = 5 seconds: t = 1 + d / 2.

    Linear, alpha 0.5: mu = 0.1875, beta = 0.5. The slope of 1/2 is shared alike: 0.1875 / 0.6875 of it is computing.
    """
    linear, affine = new_fleet(), new_fleet()
    affine.time_model = "affine"
    for fleet in (linear, affine):
        admit(fleet, "a")
        assert fleet.step_time("a") == (None, None, 0.0)
        fleet.observe("a", 4, 0.25, 0.5)
        assert fleet.step_time("a") == pytest.approx((0.25, 0.5, 0.0))  # one point: a line through the origin
        fleet.observe("a", 8, 0.125, 0.5)
    assert linear.view(8).workers[0] == WorkerView("a", 3, (1, 1, 1), 0.1875, 0.5, 0, 0.0)
    compute_seconds, transfer_seconds, fixed_seconds = affine.step_time("a")
    assert (compute_seconds, transfer_seconds, fixed_seconds) == pytest.approx((3 / 22, 8 / 22, 1.0))
    assert affine.view(8).workers[0].fixed_seconds_per_step == fixed_seconds
    # both have learnt the same, whichever is planned with
    assert linear.state_dict() == affine.state_dict()


def test_a_round_teaches_both_models() -> None:
    """One round of 2 steps: "a" took 1 + 2 seconds for 2 * 4 samples, "b" missed the deadline of 6 seconds with 3."""
    plan = RoundPlan(0, ("a", "b"), (4, 3), 2, 2, (0.0, 0.0), 0.0, 0.0, 0.0, 0, 0)
    outcome = RoundOutcome(plan, {"a": WorkerSeconds(1.0, 2.0)}, (), ("b",), None, 8, 0.0, 0.0, 0.0)
    fleet = new_fleet()
    outcome.teach(fleet, step_deadline_seconds=6.0)
    assert fleet.estimates.get("a") == (0.125, 0.25)
    assert fleet.affine.step_seconds("a", 4) == pytest.approx(1.5)
    assert fleet.estimates.get("b") == (2.0, 0.0)
    assert fleet.affine.step_seconds("b", 3) == pytest.approx(6.0)


def test_a_checkpoint_of_before_the_affine_model_loads() -> None:
    fleet = new_fleet()
    fleet.observe("a", 4, 0.25, 0.5)
    state = fleet.state_dict()
    del state["affine_estimates"]
    loaded = new_fleet()
    loaded.time_model = "affine"
    loaded.load_state_dict(json.loads(json.dumps(state)))
    assert loaded.step_time("a") == (0.25, 0.5, 0.0)  # planned with what is known
    loaded.observe("a", 8, 0.125, 0.5)
    assert loaded.step_time("a")[2] == 0.0  # one point of its own


def test_the_reference_may_be_that_of_all_data() -> None:
    """(2, 2, 0) and (0, 0, 12) are 16 samples: (1/8, 1/8, 3/4); the unweighted mean would be (1/4, 1/4, 1/2)."""
    fleet = new_fleet()
    fleet.reference = "data"
    admit(fleet, "c", ())
    assert fleet.view(8).reference_distribution is None
    admit(fleet, "a", (2, 2, 0))
    admit(fleet, "b", (0, 0, 12))
    assert fleet.view(8).reference_distribution == (0.125, 0.125, 0.75)


def test_without_a_single_sample_there_is_no_reference() -> None:
    fleet = new_fleet()
    admit(fleet, "c", ())
    assert fleet.view(512).reference_distribution is None


def test_removing_keeps_the_first_reason_and_spares_a_successor_of_the_same_name() -> None:
    fleet = new_fleet()
    older = admit(fleet, "a")
    newer = fleet.admit(b"other", registration("a"), Session(Role.SERVER))
    fleet.remove(older, "replaced")
    fleet.remove(older, "again")
    assert older.gone_reason == "replaced"
    assert fleet.by_id == {"a": newer}
    assert fleet.by_peer == {b"other": newer}
    fleet.remove(newer, "left")
    assert (fleet.by_id, fleet.by_peer) == ({}, {})
    assert fleet.known_label_counts == {"a": (1, 1, 1)}


def test_the_state_survives_json() -> None:
    fleet = new_fleet()
    admit(fleet, "a", (2, 2, 0))
    fleet.estimates.observe("a", 0.25, 0.5)
    fleet.finished(["a"])
    loaded = new_fleet()
    loaded.load_state_dict(json.loads(json.dumps(fleet.state_dict())))
    assert loaded.state_dict() == fleet.state_dict()
    assert loaded.known_label_counts == {"a": (2, 2, 0)}
    admit(loaded, "b", (0, 0, 3))
    assert loaded.view(8).reference_distribution == (0.25, 0.25, 0.5)  # "a" counts before it is back
    admit(loaded, "a", (2, 2, 0))
    assert loaded.view(8).workers[0] == WorkerView("a", 4, (2, 2, 0), 0.25, 0.5, 1)
