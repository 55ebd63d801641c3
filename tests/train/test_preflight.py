"""What a preflight makes of what ranks found, where no process is needed to see it."""

from __future__ import annotations

import time

import pytest

from qwen_dist.config import Run
from qwen_dist.errors import UserError
from qwen_dist.train.preflight.facts import Step, gather, nvme
from qwen_dist.train.preflight.here import here
from qwen_dist.train.preflight.judge import clock_problems, judge_facts, judge_results, missing
from qwen_dist.train.preflight.meeting import Meeting
from qwen_dist.train.preflight.place import Place, attempt_name, expand_counts, expand_nodes, node_of_rank, place_of


def fact(node: str, local_rank: int = 0, **more) -> dict:
    """What a rank of `node` found."""
    return {"node": node, "local_rank": local_rank, "complaints": [], **more}


def told(facts: list[dict], needed_bytes: int = 0) -> list[str]:
    """The problems as a user reads them, warnings marked."""
    problems = judge_facts(dict(enumerate(facts)), needed_bytes, "runs/x")
    return [f"{'' if problem.is_fatal else 'warning '}{problem}" for problem in problems]


def test_names_of_nodes_as_slurm_writes_them():
    assert expand_nodes("n1") == ["n1"]
    assert expand_nodes("n[1-3,07],gpu5,r[1-2]c[0-1].x") == [
        "n1", "n2", "n3", "n07", "gpu5", "r1c0.x", "r1c1.x", "r2c0.x", "r2c1.x",
    ]  # fmt: skip
    assert expand_nodes("n[08-11]") == ["n08", "n09", "n10", "n11"]
    assert expand_counts("4(x2),3") == [4, 4, 3]
    environ = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    assert [node_of_rank(rank, environ) for rank in range(4)] == ["n1", "n1", "n2", None]
    assert node_of_rank(0, {}) is None


def test_the_name_of_a_meeting():
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert attempt_name(slurm, 2, None) == "job_7.0.0"
    assert attempt_name({**slurm, "SLURM_RESTART_COUNT": "2"}, 2, None) == "job_7.2.0"
    assert attempt_name({}, 1, None) == "local"
    assert attempt_name({}, 2, "a-1") == "a-1"
    for name in ("", "../x", "a b"):
        with pytest.raises(UserError, match="is no name"):
            attempt_name({}, 2, name)
    with pytest.raises(UserError, match="add --attempt NAME"):
        attempt_name({}, 2, None)


def test_ranks_that_do_not_know_where_to_meet():
    with pytest.raises(UserError, match="does not know where to meet"):
        place_of({"RANK": "1", "WORLD_SIZE": "2"})
    assert place_of({"SLURMD_NODENAME": "n1"}) == Place(0, 1, 0, "n1")


def test_nodes_that_did_not_answer():
    problems = missing([2, 3, 9], {2: "n2", 3: "n2"}.get, 75)
    assert [str(problem).partition(";")[0] for problem in problems] == [
        "n2: ranks 2, 3 did not answer within 75 s",
        "a node that cannot be named: rank 9 did not answer within 75 s",
    ]


def test_one_node_differs_from_the_others():
    versions = [{"torch": "2.13.0"}, {"torch": "2.13.0"}, {"torch": "2.12.1"}, {"torch": "2.12.1"}, {"torch": "2.13.0"}]
    nodes = ["n1", "n1", "n2", "n2", "n3"]
    found = told([fact(node, versions=version) for node, version in zip(nodes, versions, strict=True)])
    assert found == ["n2: torch 2.12.1, where the others have 2.13.0; use one environment on all nodes."]
    assert told([fact("n1", versions={"torch": "1"}), fact("n2", versions={"torch": "2"})])[0].startswith("n2: torch 2")
    assert told([fact("n1", run_json="a"), fact("n2", run_json="b")])[0].startswith("n2: another run.json")


def test_one_sentence_for_many_nodes():
    found = told([fact(f"n{number}", complaints=["no torch; install it."]) for number in range(20)])
    assert found == ["n0, n1, n2, n3, n4, n5, n6, n7 and 12 more: no torch; install it."]


def test_tokenized_data_is_seen_by_all_or_none():
    def seen(*nodes: bool) -> list[str]:
        return told([fact(f"n{number}", prepared={"train": is_there}) for number, is_there in enumerate(nodes)])

    assert seen(True, True) == seen(False, False) == []
    assert seen(True, False)[0].startswith("n1: does not see the tokenized data.train that others see")


def gpu(**more) -> dict:
    return {"index": 0, "driver": "570.1", "errors": 0, "needs_reset": False, "is_broken": False, **more}


def test_gpus_of_nodes():
    assert told([fact("n1", gpus=[gpu()], shm_bytes=10**10), fact("n2", gpus=[gpu()], shm_bytes=10**10)]) == []
    assert "n2: GPU 0 has bad memory that cannot be replaced; drain the node." in told(
        [fact("n1", gpus=[gpu()]), fact("n2", gpus=[gpu(is_broken=True, needs_reset=True)])]
    )
    assert "would replace" in told([fact("n1", gpus=[gpu(needs_reset=True)])])[0]
    assert told([fact("n1", gpus=[gpu(errors=2)])])[0].startswith("warning n1: GPU 0 has 2 uncorrected")
    assert told([fact("n1", gpus=[gpu()]), fact("n2", gpus=[gpu(driver="550.1")])])[0].startswith(
        "n2: NVIDIA driver 550"
    )
    assert told([fact("n1", gpus=[gpu()], shm_bytes=64 << 20)])[0].startswith("warning n1: 0.07 GB free in /dev/shm")
    free, used, other = (
        {"name": name, "memory_bytes": 80 * 10**9, "free_bytes": free}
        for name, free in (("H100", 79 * 10**9), ("H100", 40 * 10**9), ("A100", 79 * 10**9))
    )
    assert told([fact("n1", gpu=free), fact("n1", 1, gpu=used)])[0].startswith("warning n1: GPU 1 has 40.0 GB in use")
    assert told([fact("n1", gpu=free), fact("n2", gpu=other)])[0].startswith("warning n2: GPU A100, where the others")


def test_a_disk_that_states_are_offloaded_to(tmp_path):
    def run(folder: str, model: str) -> Run:
        zero = {"stage": 3, "offload": "all", "nvme_path": folder}
        sections = {"model": {"path": model}, "data": {"train": [{"path": "x"}]}, "zero": zero}
        return Run.model_validate({"name": "x", **sections})

    small = tmp_path / "config.json"
    small.write_text('{"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}')
    assert nvme(run(str(tmp_path), str(small)), 8) == {}
    with pytest.raises(UserError, match=r"zero.nvme_path=/not/there is no folder that can be written there"):
        nvme(run("/not/there", str(small)), 8)
    small.write_text('{"model_type": "qwen3", "hidden_size": 65536, "intermediate_size": 262144, "vocab_size": 512}')
    with pytest.raises(UserError, match=r"GB are free at zero.nvme_path=\S+, and [\d]+ GB are offloaded to it"):
        nvme(run(str(tmp_path), str(small)), 8)


def test_a_disk_without_room_on_one_node():
    found = told([fact("n1", free_bytes=10**12), fact("n2", free_bytes=10**9)], needed_bytes=5 * 10**9)
    assert found[0].startswith("n2: 1.00 GB are free for runs/x, and the run needs 5.00 GB")


def test_the_rank_that_came_least_far_is_named():
    nodes = {0: "n1", 1: "n2", 2: "n3"}
    lost = {"stage": "connected", "error": "timeout"}
    results = {0: lost, 1: {"stage": "nothing", "error": "refused"}, 2: lost}
    assert str(judge_results(results, nodes)[0]).startswith("n2: could not reach the meeting point (refused)")
    assert judge_results(dict.fromkeys(nodes, lost), nodes)[0].nodes == ("n1", "n2", "n3")
    well = {"stage": "reduced", "error": None, "offset_s": 0.01}
    assert judge_results(dict.fromkeys(nodes, well), nodes) == []
    assert judge_results({**dict.fromkeys(nodes, well), 2: {**well, "offset_s": 40.0}}, nodes)[0].nodes == ("n3",)


@pytest.mark.parametrize(
    ("skews", "expected"),
    [
        ({"n1": 0.0, "n2": 0.9}, {}),
        ({"n1": 0.0, "n2": 0.1, "n3": -5.0}, {"n3": False}),
        ({"n1": 0.0, "n2": 3600.0, "n3": 0.2}, {"n2": True}),
        ({"n1": 0.0, "n2": 30.0, "n3": 30.0}, {"n1": False}),  # rank 0's own clock is the odd one
        ({}, {}),
    ],
)
def test_clocks_that_are_apart(skews, expected):
    assert {problem.nodes[0]: problem.is_fatal for problem in clock_problems(skews)} == expected


def test_what_hangs_or_breaks_does_not_stop_the_rest():
    def broken() -> dict:
        raise OSError("no such device")

    def refused() -> dict:
        raise UserError("no GPU; mend it.")

    steps = [
        Step("slow", 0.2, lambda: time.sleep(60) or {}),
        Step("broken", 5, broken),
        Step("refused", 5, refused),
        Step("fine", 5, lambda: {"answer": 42}),
    ]
    found = gather(steps)
    assert found["answer"] == 42
    assert found["complaints"] == [
        "slow: no answer within 0 s; the node hangs there.",
        "broken failed: OSError: no such device",
        "no GPU; mend it.",
    ]


def test_a_meeting_waits_for_all_until_its_deadline(tmp_path):
    first, second = (Meeting(tmp_path / "a", rank, nudges=True) for rank in (0, 1))
    first.tell("facts", {"x": 1})
    assert first.wait("facts", [0, 1], time.monotonic() + 0.2) == {0: {"x": 1}}
    second.tell("facts", {"x": 2})
    started = time.monotonic()
    assert first.wait("facts", [0, 1], started + 300) == {0: {"x": 1}, 1: {"x": 2}}
    assert time.monotonic() - started < 200  # not until the deadline
    assert first.read("verdict", [0]) == {}


def test_what_torch_and_deepspeed_find_here():
    found = here("cpu", "auto")
    assert found["async_io"] and found["attention"] == ("sdpa", "no GPU") and found["kernels"] == ("torch", "no GPU")
    assert {"python", "torch", "deepspeed", "transformers", "peft"} <= set(found["versions"])
    assert "flash-attn" in here("cuda", "flash_attention_2")["attention_error"]
