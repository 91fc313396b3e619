"""`shoal expel`, `rotate-key`, `doctor`, `drop` and single-use invites, against a fake daemon."""

import json

import pytest

DOCTOR = {
    "mesh": "m",
    "listening": ["/ip4/10.0.0.1/tcp/4001/p2p/me"],
    "reachability": "unknown",
    "nat": "unknown",
    "disk_path": "/d",
    "disk_free_bytes": 5 << 30,
    "memory_free_bytes": None,
    "accelerators": [],
    "peers": [{"name": "desk", "path": "direct", "dialled": "by them", "rtt_s": 0.0123, "bytes_per_s": None}],
}


def test_an_invite_may_serve_one_computer_only(shoal, daemon):
    assert shoal("invite", "--once").status == 0
    assert ("/shoal/invite", {"ttl_s": 86400.0, "single_use": True}) in daemon.seen


def test_expel_says_who_went_and_who_stays(shoal, daemon):
    answer = {"expelled": "12D3x", "kept": ["12D3y"]}
    daemon.answers["/shoal/expel"] = (200, answer)
    outcome = shoal("expel", "desk")
    assert (outcome.status, outcome.out) == (0, "12D3x is expelled\n")
    assert "1 that came in through it stay" in outcome.err
    assert ("/shoal/expel", {"peer": "desk", "branch": False}) in daemon.seen
    assert json.loads(shoal("expel", "desk", "--branch", "--json").out) == answer
    assert ("/shoal/expel", {"peer": "desk", "branch": True}) in daemon.seen


def test_the_key_is_changed_with_an_overlap(shoal, daemon):
    daemon.answers["/shoal/rotate"] = (200, {"overlap_s": 3600.0})
    outcome = shoal("rotate-key", "--overlap", "1h")
    assert (outcome.status, outcome.out) == (0, "the swarm key has changed\n")
    assert ("/shoal/rotate", {"overlap_s": 3600.0}) in daemon.seen


@pytest.mark.parametrize(("level", "status"), [("note", 0), ("blocker", 1)])
def test_doctor_draws_figures_and_steps(shoal, daemon, level, status):
    finding = {"level": level, "what": "it rains", "next_step": "take a coat"}
    daemon.answers["/shoal/doctor"] = (200, DOCTOR | {"findings": [finding]})
    outcome = shoal("doctor")
    assert outcome.status == status
    for part in ("12.3 ms", "unknown", "5.0 GiB free", "it rains", "next: take a coat"):
        assert part in outcome.out
    assert json.loads(shoal("doctor", "--json").out)["findings"] == [finding]


def test_doctor_answers_without_a_daemon(shoal, home):
    outcome = shoal("doctor", "--json")
    assert outcome.status == 1
    assert json.loads(outcome.out)["running"] is False
    assert not (home / "data" / "shoal").exists()


def test_drop_says_what_went_and_that_files_stay(shoal, daemon):
    answer = {"dropped": "qwen", "manifest": "ab" * 32}
    daemon.answers["/shoal/drop"] = (200, answer)
    outcome = shoal("drop", "qwen")
    assert (outcome.status, outcome.out) == (0, "qwen is dropped from the mesh\n")
    assert "files stay where they are" in outcome.err
    assert "add DIR --name qwen" in outcome.err
    assert daemon.seen == [("/shoal/drop", {"model": "qwen"})]
    outcome = shoal("drop", "ab" * 32, "--json")
    assert (json.loads(outcome.out), outcome.err) == (answer, "")


def test_a_drop_on_the_wrong_node_names_the_right_one_in_one_line(shoal, daemon):
    said = "qwen can be dropped only on the node that added it: desk (12D3x)"
    daemon.answers["/shoal/drop"] = (400, {"error": {"message": said}})
    outcome = shoal("drop", "qwen")
    assert (outcome.status, outcome.out, outcome.err) == (1, "", f"shoal: {said}\n")
