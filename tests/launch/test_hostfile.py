"""The machines of a run over ssh, and what is said of a hostfile that is wrong."""

from __future__ import annotations

import re

import pytest

from launch.hosts import num_nodes, processes_per_node, world_size_of
from launch.ssh.hostfile import Host, hosts_of, read_hostfile
from qwen_dist.config import Cluster, Data, Model, Run, Source
from qwen_dist.errors import UserError
from tests.launch.conftest import write_run


def run_on(**cluster) -> Run:
    return Run(name="r", model=Model(path="m"), data=Data(train=(Source(path="x"),)), cluster=Cluster(**cluster))


def test_a_hostfile_as_deepspeed_reads_it(tmp_path):
    (tmp_path / "hosts").write_text("# rack\nnode1 slots=8\n\n  me@node2   slots=8  # the new one\nfe80::1 slots=8\n")
    run = run_on(kind="hosts", hostfile=str(tmp_path / "hosts"))
    assert hosts_of(run) == (Host("node1", 8), Host("me@node2", 8), Host("fe80::1", 8))
    assert (num_nodes(run), processes_per_node(run, 0), world_size_of(run, 8)) == (3, 8, 24)


def test_hosts_of_the_run_file():
    run = run_on(kind="hosts", hosts=("node1", "node2"), gpus_per_node=4)
    assert hosts_of(run) == (Host("node1"), Host("node2"))
    assert (num_nodes(run), processes_per_node(run, 0), world_size_of(run, 4)) == (2, 4, 8)
    with pytest.raises(UserError, match=r"a run on several hosts must know its GPUs; set cluster\.gpus_per_node"):
        processes_per_node(run_on(kind="hosts", hosts=("node1",)), 8)
    assert num_nodes(run_on(kind="slurm", nodes=3)) == 3
    assert num_nodes(run_on()) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("node1 slots=8\nnode2\n", ":2: lacks slots; write it as: node2 slots=8."),
        ("node1 slots=eight\n", ":1: slots=eight is no number of processes; write it as: node1 slots=8."),
        ("node1 slots=0\n", ":1: slots=0 is no number of processes; write it as: node1 slots=8."),
        ("node1 gpus=8\n", ":1: does not understand 'gpus=8'; write it as: node1 slots=8."),
        ("node1 slots=8 max_slots=8\n", ":1: does not understand 'slots=8 max_slots=8'; write it as: node1 slots=8."),
        ("node1 slots=2\n#\nnode1 slots=2\n", ":3: node1 is on line 1 already; remove one."),
        (
            "node1 slots=2\nnode2 slots=4\n",
            ":2: node2 has slots=4, but the first machine has 2; all machines run the same number of processes.",
        ),
        (
            "-oProxyCommand=id slots=2\n",
            ":1: '-oProxyCommand=id' is no machine's name; write it as ssh takes it, as node1 or me@node1.",
        ),
        ("# nothing\n", " names no machine; write lines as: node1 slots=8."),
        (b"\xff\xfe", " is no text; write lines as: node1 slots=8."),
    ],
)
def test_what_is_wrong_has_its_line(tmp_path, text, sentence):
    path = tmp_path / "hosts"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as refused:
        read_hostfile(path)
    assert str(refused.value).removeprefix("hostfile ") == f"{path}{sentence}"


def test_slots_agree_with_gpus_per_node(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("node1 slots=8\n")
    assert num_nodes(run_on(kind="hosts", hostfile=str(path), gpus_per_node=8)) == 1
    with pytest.raises(UserError, match=r"hosts:1: node1 has slots=8, but cluster\.gpus_per_node is 4"):
        hosts_of(run_on(kind="hosts", hostfile=str(path), gpus_per_node=4))


@pytest.mark.parametrize("name", ["-v", "a b", "a;id", "$(id)", "a\nb", "@a", "a@-v", "`id`"])
def test_a_host_that_is_no_name(name):
    with pytest.raises(UserError, match=re.escape("cluster.hosts.1: ")):
        hosts_of(run_on(kind="hosts", hosts=("node1", name)))


def test_a_host_twice():
    with pytest.raises(UserError, match=r"cluster\.hosts names node1 twice"):
        hosts_of(run_on(kind="hosts", hosts=("node1", "node1")))


def test_a_hostfile_is_looked_for_beside_the_run_file(project, cli):
    (project / "below").mkdir()
    write_run(project / "below", cluster={"kind": "hosts", "hostfile": "hosts"})
    assert f"no file {project}/below/hosts" in cli("train", "below/run.yaml", "--dry-run").err
    assert cli("train", "below/run.yaml", "cluster.hostfile=hosts", "--dry-run").code == 2
