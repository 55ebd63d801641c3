"""The machines of a run of kind hosts, over ssh: looked at before anything is written, started, stopped, ended.

DeepSpeed's own way over ssh (pdsh, 0.19.8) writes the exported variables on the remote command line, where every user
can read them, and leaves the ranks running on TERM. Here ssh starts `python -m launch.ssh.remote`, and all else goes
through that connection; DeepSpeed's launcher of a node starts the ranks.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.hosts import node_argv, processes_per_node
from launch.ssh.hostfile import hosts_of
from launch.ssh.remote import ANSWER, BEAT_S
from launch.supervise import ORPHAN_GRACE_S, POLL_S, Outcome, Stop, outcome_of, stop_signals
from qwen_dist.config import Run
from qwen_dist.config_cluster import SECRET
from qwen_dist.errors import EXIT_DONE, EXIT_RESUMABLE, EnvironmentNotReady, counted
from qwen_dist.run_dir import RunDir

# No password is asked for; a machine that is gone is noticed in 5 s at the start, in a minute later.
SSH_OPTIONS = ("BatchMode=yes", "ConnectTimeout=5", "ServerAliveInterval=15", "ServerAliveCountMax=4")
SSH_FAILED = 255
MASTER_PORT = 29500
LOOK_TIMEOUT_S = 60.0
# Ranks that have lost a machine may say so for this long before they are ended.
FAILED_GRACE_S = 10.0
# What other machines get of this one's environment. Never a secret, and nothing that is a machine's own.
EXPORTED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "TOKENIZERS_PARALLELISM")
EXPORTED_PREFIXES = (
    "NCCL_", "GLOO_", "UCX_", "FI_", "CUDA_", "OMP_", "MKL_", "TORCH", "PYTORCH_", "TRITON_", "DS_", "HF_",
    "TRANSFORMERS_", "WANDB_",
)  # fmt: skip
OWN = ("CUDA_VISIBLE_DEVICES",)
LOGINS = {"WANDB_API_KEY": "wandb login", "HF_TOKEN": "hf auth login", "HUGGING_FACE_HUB_TOKEN": "hf auth login"}


@dataclass(frozen=True)
class Cluster:
    """Machines that answered.

    Attributes:
        names: their ssh names, in the order of their ranks.
        master: address and port at which rank 0 is found.
    """

    names: tuple[str, ...]
    master: tuple[str, int]


def exported(environ: Mapping[str, str]) -> dict[str, str]:
    """What other machines get of `environ`: an allow-list, and of that no secret."""
    return {
        name: value
        for name, value in environ.items()
        if name in EXPORTED or (name.startswith(EXPORTED_PREFIXES) and name not in OWN and not SECRET.search(name))
    }


def logins_not_passed_on(environ: Mapping[str, str]) -> str | None:
    """A warning where this machine's environment holds a token that the others will not get."""
    found = [name for name in LOGINS if environ.get(name)]
    if not found:
        return None
    commands = " and ".join(dict.fromkeys(LOGINS[name] for name in found))
    return f"the other machines do not get {' and '.join(found)}; log in on each of them once, with {commands}."


def ssh_argv(run: Run, host: str, python: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The command that starts `launch.ssh.remote` on a machine; the user's own ssh options count first."""
    options = [word for option in SSH_OPTIONS for word in ("-o", option)]
    path = environ.get("PYTHONPATH")
    remote = [*(["env", f"PYTHONPATH={path}"] if path else []), python, "-m", "launch.ssh.remote"]
    return ["ssh", *run.cluster.ssh_options, *options, "-T", "--", host, shlex.join(remote)]


def planned_cluster(run: Run) -> Cluster:
    """The machines of the run, none of them asked; rank 0 at DeepSpeed's usual port.

    Raises:
        UserError: its hosts or hostfile are wrong.
    """
    names = tuple(host.name for host in hosts_of(run))
    port = int(run.cluster.env.get("MASTER_PORT", MASTER_PORT))
    return Cluster(names, (run.cluster.env.get("MASTER_ADDR") or _address_of(run, names[0]), port))


def node_argvs(run: Run, run_dir: RunDir, cluster: Cluster, python: str = sys.executable) -> list[list[str]]:
    """The command that starts the trainer on each machine of `cluster`."""
    nodes, per_node = len(cluster.names), processes_per_node(run, 0)
    return [node_argv(run_dir.path, python, nodes, per_node, node, cluster.master) for node in range(nodes)]


def look_at_hosts(run: Run, run_dir: RunDir, python: str = sys.executable) -> Cluster:
    """Look at all machines of the run, at the same time. Leaves nothing behind.

    Args:
        run: a run of kind hosts.
        run_dir: its directory, which all machines must see.
        python: the interpreter, at the same path everywhere.

    Raises:
        EnvironmentNotReady: a machine does not answer, or cannot take part; names it.
    """
    planned = planned_cluster(run)
    names, (address, _) = planned.names, planned.master
    with _probe_file(run_dir.path) as (probe, word):
        task = {"look": {"probe": str(probe), "word": word, "master": address}}
        with ThreadPoolExecutor(len(names)) as pool:
            answers = list(pool.map(lambda name: _ask(ssh_argv(run, name, python), task), names))
    wrong: dict[str, list[str]] = {}
    for name, answer in zip(names, answers, strict=True):
        is_first_machine = answer.get("machine") == answers[0].get("machine")
        if problem := _problem(answer, is_first_machine, run, run_dir, python, address):
            wrong.setdefault(problem, []).append(name)
    for problem, hosts in wrong.items():
        raise EnvironmentNotReady(f"{' and '.join(hosts)} {problem}")
    return planned if "MASTER_PORT" in run.cluster.env else Cluster(names, (address, int(answers[0]["port"])))


def run_on_hosts(
    run: Run,
    run_dir: RunDir,
    cluster: Cluster,
    variables: Mapping[str, str],
    say: Callable[[str], object],
    stop: Stop | None = None,
) -> Outcome:
    """Run the trainer on all machines to its end, and leave nothing on any.

    Args:
        run: a run of kind hosts.
        run_dir: where the outcome is recorded.
        cluster: the machines, which have answered.
        variables: what ranks get besides what is exported of this machine's environment.
        say: told in a line what happened to a machine.
        stop: of `stop_signals`, where the caller has them already.
    """
    run_dir.outcome.unlink(missing_ok=True)
    environ = {**exported(os.environ), **variables}
    agents = []
    with nullcontext(stop) if stop is not None else stop_signals() as stop:
        try:
            for name, argv in zip(cluster.names, node_argvs(run, run_dir, cluster), strict=True):
                task = {"argv": argv, "environ": environ, "setup": list(run.cluster.setup)}
                agents.append(Agent.start(name, ssh_argv(run, name, sys.executable), {"run": task}))
            lost = _watch(agents, stop, say)
        finally:
            for agent in agents:
                agent.close()
            for agent in agents:
                agent.end()
    stop.before_ranks = all(agent.process.returncode == EXIT_RESUMABLE for agent in agents)
    return outcome_of(run_dir, stop, f"{lost} was lost" if lost else "the trainer ended without a word")


@dataclass
class Agent:
    """`launch.ssh.remote` on one machine, at the other end of an ssh that takes orders on its stdin."""

    host: str
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, host: str, argv: Sequence[str], task: Mapping[str, Any]) -> Agent:
        """Start it with its task; in a session of its own, which the terminal's Ctrl-C does not reach."""
        agent = cls(host, subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True))
        agent.send(task)
        return agent

    def send(self, order: Mapping[str, Any]) -> None:
        """Send one line; a connection that is gone is noticed elsewhere."""
        with suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """End the connection: all that runs at its other end is killed there."""
        with suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()

    def end(self) -> None:
        """Wait until the closed connection is gone."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(FAILED_GRACE_S)
        self.process.kill()
        self.process.wait()


def _watch(agents: Sequence[Agent], stop: Stop, say: Callable[[str], object]) -> str | None:
    """Wait for the end of all; the machine whose connection was lost, if any."""
    lost, is_told, beat_at, deadline = None, False, time.monotonic(), float("inf")
    while running := [agent for agent in agents if agent.process.poll() is None]:
        now = time.monotonic()
        if stop.is_forced or now > deadline:
            return lost
        if stop.asked is not None and not is_told:
            is_told = True
            for agent in running:
                agent.send({"stop": stop.asked.name})
        if now >= beat_at:
            beat_at = now + BEAT_S
            for agent in running:
                agent.send({})
        for agent in agents:
            code = agent.process.returncode
            if lost is None and code is not None and (code == SSH_FAILED or code < 0):
                lost = agent.host
                say(f"error: the connection to {lost} was lost; ending the run on all machines")
        if len(running) < len(agents):
            ended = {agent.process.returncode for agent in agents} - {None}
            is_orderly = ended <= {EXIT_DONE, EXIT_RESUMABLE}
            deadline = min(deadline, now + (ORPHAN_GRACE_S if is_orderly else FAILED_GRACE_S))
        time.sleep(POLL_S)
    return lost


@contextmanager
def _probe_file(run_dir: Path) -> Iterator[tuple[Path, str]]:
    """A file with a word of its own in the nearest folder that is there, gone after the block."""
    folder = next(folder for folder in (run_dir, *run_dir.parents) if folder.is_dir())
    word = uuid.uuid4().hex
    probe = folder / f".{word[:8]}.probe"
    try:
        probe.write_text(word, encoding="utf-8")
    except OSError as error:
        raise EnvironmentNotReady(
            f"{folder} cannot be written ({error.strerror}); set output_dir to another place."
        ) from None
    try:
        yield probe, word
    finally:
        probe.unlink(missing_ok=True)


def _ask(argv: Sequence[str], task: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of `launch.ssh.remote`; {"code", "said"} where it gave none."""
    order = json.dumps(task).encode() + b"\n"
    try:
        done = subprocess.run(argv, input=order, capture_output=True, timeout=LOOK_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise EnvironmentNotReady("ssh was not found; install an OpenSSH client.") from None
    except subprocess.TimeoutExpired:
        return {"code": None, "said": ""}
    lines = done.stdout.decode(errors="replace").splitlines()
    answer = next((line.removeprefix(ANSWER) for line in lines if line.startswith(ANSWER)), None)
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return json.loads(answer) if answer else {"code": done.returncode, "said": said[-1] if said else ""}


def _problem(
    answer: Mapping[str, Any], is_first_machine: bool, run: Run, run_dir: RunDir, python: str, master: str
) -> str | None:
    """What keeps a machine from taking part, as the end of a sentence that begins with its name."""
    if "code" in answer:
        why = f" ({answer['said']})" if answer["said"] else ""
        if answer["code"] is None:
            return f"did not answer in {LOOK_TIMEOUT_S:.0f} s; look at the machine, or take it out of the hosts."
        if answer["code"] == SSH_FAILED:
            return f"cannot be reached by ssh{why}; look at the machine and its login, or take it out of the hosts."
        return f"cannot start qwen-dist with {python}{why}; install it at the same path on every machine."
    if not answer["sees_files"]:
        return f"does not see {run_dir.path.parent}; set output_dir to a folder that all machines share."
    if not answer["knows_master"] or (answer["master_is_local"] and not is_first_machine):
        return f"does not know the first machine as {master}; set cluster.env.MASTER_ADDR to an address that all know."
    wanted = processes_per_node(run, 0)
    if run.cluster.device != "cpu" and answer["num_gpus"] < wanted:
        found = counted(answer["num_gpus"], "GPU")
        return f"shows {found}, and this run wants {wanted} on each machine; set cluster.gpus_per_node, or its slots."
    return None


def _address_of(run: Run, host: str) -> str:
    """The name or address behind an ssh name, as ssh's own configuration has it."""
    try:
        argv = ["ssh", *run.cluster.ssh_options, "-G", "--", host]
        told = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return host.rpartition("@")[2]
    settings = dict(line.partition(" ")[::2] for line in told.splitlines())
    return settings.get("hostname", host.rpartition("@")[2])
