#!/usr/bin/env bash
# A real Slurm on this one machine: munge, slurmctld, and two slurmd as nodes n1 and n2, for the tests.
# usage: cluster.sh up|down. State lies under .slurm/ in the repository. Needs root, slurm-wlm and munge.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
state=$root/.slurm
conf=$state/slurm.conf
export SLURM_CONF=$conf

answers() { [ -f "$conf" ] && [ "$(sinfo --noheader --states=idle,mixed,allocated --format=%D 2>/dev/null)" = 2 ]; }

# Whether the daemon of that pid file lives; its name is checked, since a number outlives its process.
runs() { [ -f "$state/$1.pid" ] && [ "$(cat "/proc/$(cat "$state/$1.pid")/comm" 2>/dev/null)" = "${1%-n?}" ]; }

# cred_expire: a requeued job waits until its old credential is void, 120 s by default, and 5 s at least.
write_conf() {
  mkdir -p "$state"/{ctld,spool/n1,spool/n2,log}
  local host cores
  host=$(hostname -s)
  cores=$(nproc)
  cat >"$conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$state/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/spool/%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd-%n.pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdLogFile=$state/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
MailProg=/bin/true
KillWait=30
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=16818 CPUs=$cores Gres=gpu:1 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=16819 CPUs=$cores Gres=gpu:1 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
  printf 'NodeName=n%s Name=gpu File=/dev/null\n' 1 2 >"$state/gres.conf"
  printf 'CgroupAutomount=no\nConstrainCores=no\n' >"$state/cgroup.conf"
}

start_munge() {
  runs munged && return
  rm -f "$state"/munge.{socket*,pid}
  [ -s "$state/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$state/munge.key")
  munged --force --num-threads=2 --key-file="$state/munge.key" --socket="$state/munge.socket" \
    --pid-file="$state/munged.pid" --log-file="$state/log/munged.log" --seed-file="$state/munge.seed"
}

up() {
  for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || {
      echo "error: $program is missing; on Debian: apt-get install slurm-wlm munge" >&2
      exit 3
    }
  done
  if answers; then
    echo "Slurm is up: two nodes. Use it with: export SLURM_CONF=$conf"
    return
  fi
  write_conf
  start_munge
  runs slurmctld || slurmctld -f "$conf" -c
  for node in n1 n2; do
    runs "slurmd-$node" || slurmd -f "$conf" -N "$node"
  done
  for _ in $(seq 100); do
    answers && break
    scontrol update NodeName=n1,n2 State=RESUME >/dev/null 2>&1 || true
    sleep 0.3
  done
  if ! answers; then
    echo "error: Slurm did not come up; its logs are in $state/log" >&2
    tail -n 5 "$state"/log/*.log >&2
    exit 3
  fi
  echo "Slurm is up: two nodes. Use it with: export SLURM_CONF=$conf"
}

down() {
  for daemon in slurmd-n1 slurmd-n2 slurmctld munged; do
    if runs "$daemon"; then
      kill "$(cat "$state/$daemon.pid")" 2>/dev/null || true
    fi
  done
  for _ in $(seq 50); do
    runs slurmd-n1 || runs slurmd-n2 || runs slurmctld || runs munged || break
    sleep 0.1
  done
  rm -rf "$state"
  echo "Slurm is down."
}

case "${1:-}" in
up) up ;;
down) down ;;
*)
  echo "usage: $0 up|down" >&2
  exit 2
  ;;
esac
