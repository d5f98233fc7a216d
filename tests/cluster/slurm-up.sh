#!/usr/bin/env bash
# slurm-up.sh - a REAL small Slurm cluster on one Debian 12 machine, unattended.
#
#   slurm-up.sh up            install what is missing, start the cluster, wait until
#                             every node is IDLE (idempotent: a healthy one is left alone)
#   slurm-up.sh down          stop everything it started, remove its namespaces
#   slurm-up.sh status        what runs;   exit 0 only when the cluster is healthy
#   slurm-up.sh exec CMD...   run CMD on the "login host" (slurmctld's namespace)
#   slurm-up.sh on NODE CMD.. run CMD on a node (as another process of that host)
#   slurm-up.sh node-kill N   power failure: node N falls silent, every process of it dies at once
#   slurm-up.sh node-start N  power the node on again (slurmd starts)
#   slurm-up.sh slurmd-kill N kill -9 only the slurmd of N (its job steps live on)
#   slurm-up.sh slurmd-start N start the slurmd of N again
#   slurm-up.sh net-cut N     unplug N's network cable;  net-join N plugs it in again
#   slurm-up.sh link-cut      cut the nodes off from each other only: Slurm still reaches them all;
#                             link-join mends that, and waits until they reach each other
#   slurm-up.sh ctld-restart  stop and start slurmctld (state kept)
#   slurm-up.sh install       only the apt-get step
#
# Each node is a network + UTS + PID + mount namespace: own address, own hostname, own
# /dev/shm, own process table. The host's file system is shared (it plays the NFS).
# The bridge lives in the login host's namespace: no interface is added to the host's
# own network, none of the namespaces has a route out, /etc/slurm/slurm.conf and the
# node names exist only inside the namespaces (so a stray sbatch outside cannot send).
#
# Settings (environment): 
#   SLURM_LAB_NAME=slurmlab       several clusters stand side by side under different names
#   SLURM_LAB_DIR=/run/NAME       state, logs, keys        SLURM_LAB_NODES=2
#   SLURM_LAB_GPUS=2              fake GPUs a node (0: no GRES at all)
#   SLURM_LAB_GPU_TYPE=           e.g. a100: then --gres=gpu:a100:1 works as well as gpu:1
#   SLURM_LAB_FEATURES=           e.g. volta32gb: for --constraint
#   SLURM_LAB_EXTRA=              more slurm.conf lines (the last value of a key wins)
#   SLURM_LAB_CPUS=16 SLURM_LAB_MEM=64000   what each node claims to have (MB)
#   SLURM_LAB_SLURMDBD=0          1: MariaDB + slurmdbd, so sacct/QOS/accounts work
#   SLURM_LAB_NODE_TIMEOUT=10     SlurmdTimeout: a dead node is DOWN after about 3 times this
#   SLURM_LAB_KEEP=0              1: `up` keeps the job state of an earlier run
#
# up, down and install must be run outside (not under `exec`); everything else may be
# called from inside `exec` too, so a test under `exec pytest` can kill and start nodes.
# `up` on a healthy cluster changes nothing, even if the settings differ: `down` first.
set -euo pipefail

P=${SLURM_LAB_NAME:-slurmlab}   # prefix of the network namespaces' names
LAB=${SLURM_LAB_DIR:-/run/$P}
NODES=${SLURM_LAB_NODES:-2}
GPUS=${SLURM_LAB_GPUS:-2}
CPUS=${SLURM_LAB_CPUS:-16}
MEM=${SLURM_LAB_MEM:-64000}
DBD=${SLURM_LAB_SLURMDBD:-0}
KEEP=${SLURM_LAB_KEEP:-0}
NODE_TIMEOUT=${SLURM_LAB_NODE_TIMEOUT:-10}
GPU_TYPE=${SLURM_LAB_GPU_TYPE:-}
FEATURES=${SLURM_LAB_FEATURES:-}
EXTRA=${SLURM_LAB_EXTRA:-}
NET=10.77.0                     # only ever routed inside the namespaces made here
SELF=$(readlink -f "$0")

say() { printf 'slurm-up: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
names() { local i; for ((i = 1; i <= NODES; i++)); do echo "n$i"; done; }
[ "$(id -u)" = 0 ] || die "must be root"
[ -f "$LAB/settings" ] && case ${1:-} in up) ;; *) . "$LAB/settings" ;; esac

# A process counts as alive only if it is the right program and no zombie: PID 1 of this
# kind of VM reaps orphans late, so `kill -0` succeeds on a dead daemon for some seconds.
alive() { # PID [COMM]
  local st
  [ -n "${1:-}" ] && [ -r "/proc/$1/stat" ] || return 1
  st=$(sed -E 's/^[0-9]+ \(([^)]*)\) (.).*/\1 \2/' "/proc/$1/stat" 2>/dev/null) || return 1
  [ "${st##* }" != Z ] && { [ -z "${2:-}" ] || [ "${st% *}" = "$2" ]; }
}
pidof_file() { [ -s "$1" ] && tr -cd 0-9 < "$1" || true; }
stop_pid() { # PIDFILE COMM [SECONDS]
  local p i; p=$(pidof_file "$1")
  alive "$p" "$2" || { rm -f "$1"; return 0; }
  kill "$p" 2>/dev/null || true
  for ((i = 0; i < ${3:-10} * 20; i++)); do alive "$p" "$2" || break; sleep 0.05; done
  if alive "$p" "$2"; then kill -9 "$p" 2>/dev/null || true; fi
  rm -f "$1"
}

# ---------------------------------------------------------------- packages
need() { dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null | grep -q '^ii'; }
do_install() {
  local want=() p pk="munge slurmctld slurmd slurm-client iproute2 util-linux"
  [ "$DBD" = 1 ] && pk="$pk slurmdbd mariadb-server"
  for p in $pk; do need "$p" || want+=("$p"); done
  [ ${#want[@]} = 0 ] && return 0
  say "installing ${want[*]}"
  # policy-rc.d 101 keeps the packages from starting services by themselves
  local made=0
  [ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
                                    chmod 755 /usr/sbin/policy-rc.d; made=1; }
  local o=(-y -q --no-install-recommends -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3)
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -q && apt-get install "${o[@]}" "${want[@]}"; } < /dev/null > /tmp/$P-apt.log 2>&1 \
    || { tail -20 /tmp/$P-apt.log >&2; [ $made = 1 ] && rm -f /usr/sbin/policy-rc.d; die "apt-get failed"; }
  [ $made = 1 ] && rm -f /usr/sbin/policy-rc.d
  return 0
}

# ---------------------------------------------------------------- hosts
on_ctl() { # run on the login host: stateless, the caller's directory is kept
  ip netns exec $P-ctl unshare --uts -- sh -c 'hostname ctl; exec "$@"' sh "$@"
}
init_pid() { local p; p=$(pidof_file "$LAB/$1/init.pid"); alive "$p" bash && echo "$p" || true; }
on_node() { # NODE CMD...
  local n=$1 p; shift; p=$(init_pid "$n"); [ -n "$p" ] || die "node $n is off"
  nsenter -t "$p" -m -u -n -p --wdns="$PWD" -- "$@"
}
net_up() {
  local n i=0 ns
  [ -e /run/netns/$P-ctl ] || ip netns add $P-ctl
  ip -n $P-ctl link set lo up
  ip -n $P-ctl link show br0 > /dev/null 2>&1 || ip -n $P-ctl link add br0 type bridge forward_delay 0
  ip -n $P-ctl addr replace $NET.254/24 dev br0; ip -n $P-ctl link set br0 up
  for n in $(names); do
    i=$((i + 1)); ns=$P-$n
    [ -e /run/netns/$ns ] || ip netns add $ns
    ip -n $ns link set lo up
    ip -n $ns link show eth0 > /dev/null 2>&1 || {
      ip link add eth0 netns $ns type veth peer name p-$n netns $P-ctl
      ip -n $P-ctl link set p-$n master br0; }
    ip -n $P-ctl link set p-$n up
    ip -n $ns addr replace $NET.$i/24 dev eth0; ip -n $ns link set eth0 up
  done
  # belt and braces: from the host's own network nothing may ever leave for these addresses
  ip route replace blackhole $NET.0/24
}
write_conf() {
  local n i hosts h
  hosts="127.0.0.1 localhost"$'\n'"$NET.254 ctl"; i=0
  for n in $(names); do i=$((i + 1)); hosts+=$'\n'"$NET.$i $n"; done
  install -d -m 755 "$LAB/etc" "$LAB/state" "$LAB/log" "$LAB/dev"
  : > "$LAB/etc/gres.conf"; echo 'CgroupPlugin=cgroup/v1' > "$LAB/etc/cgroup.conf"
  : > "$LAB/etc/plugstack.conf"
  local gres= k
  if [ "$GPUS" -gt 0 ]; then
    gres="Gres=gpu${GPU_TYPE:+:$GPU_TYPE}:$GPUS"
    for ((k = 0; k < GPUS; k++)); do [ -e "$LAB/dev/gpu$k" ] || mknod -m 666 "$LAB/dev/gpu$k" c 1 3 || touch "$LAB/dev/gpu$k"; done
    echo "Name=gpu${GPU_TYPE:+ Type=$GPU_TYPE} File=$LAB/dev/gpu[0-$((GPUS - 1))]" > "$LAB/etc/gres.conf"
  fi
  {
    cat <<CONF
ClusterName=lab
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s); where a launch
# takes longer, it fails
AuthInfo=socket=$LAB/munge/socket,cred_expire=10
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/%n/spool
SlurmctldPidFile=$LAB/slurmctld.pid
SlurmdPidFile=$LAB/%n/slurmd.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
LogTimeFormat=iso8601_ms
# no cgroups needed
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
# nodes may claim more cores and memory than the machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
# Short clocks, for tests, where they have to run out; long ones where a busy machine must not make them run out.
# KillWait is Slurm's default: what is left to save between TERM and KILL.
SlurmctldTimeout=10
SlurmdTimeout=$NODE_TIMEOUT
MessageTimeout=30
KillWait=30
WaitTime=0
InactiveLimit=0
MinJobAge=3600
BatchStartTimeout=120
CompleteWait=0
ReturnToService=2
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONF
    if [ "$DBD" = 1 ]; then
      echo "AccountingStorageType=accounting_storage/slurmdbd"
      echo "AccountingStorageHost=ctl"
      echo "AccountingStoragePass=$LAB/munge/socket"   # the munge socket, not a password
      echo "AccountingStoreFlags=job_comment,job_env,job_script"
      [ "$GPUS" -gt 0 ] && echo "AccountingStorageTRES=gres/gpu"
      echo "JobCompType=jobcomp/none"
    else
      echo "AccountingStorageType=accounting_storage/none"
      echo "JobCompType=jobcomp/filetxt"
      echo "JobCompLoc=$LAB/log/jobcomp.txt"
    fi
    [ "$GPUS" -gt 0 ] && echo "GresTypes=gpu"
    [ -z "$EXTRA" ] || printf '%s\n' "$EXTRA"
    i=0
    for n in $(names); do i=$((i + 1))
      echo "NodeName=$n NodeAddr=$NET.$i CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM $gres ${FEATURES:+Feature=$FEATURES} State=UNKNOWN"
    done
    echo "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP"
    echo "PartitionName=low   Nodes=ALL MaxTime=INFINITE PriorityTier=1  PreemptMode=REQUEUE GraceTime=60 State=UP"
    echo "PartitionName=high  Nodes=ALL MaxTime=INFINITE PriorityTier=20 PreemptMode=OFF State=UP"
  } > "$LAB/etc/slurm.conf"
  # what `ip netns exec` binds over /etc/... inside each namespace
  for h in ctl $(names); do
    install -d "/etc/netns/$P-$h/slurm"
    printf '%s\n' "$hosts" > "/etc/netns/$P-$h/hosts"
    echo "$h" > "/etc/netns/$P-$h/hostname"
    sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf > "/etc/netns/$P-$h/nsswitch.conf"
    : > "/etc/netns/$P-$h/resolv.conf"
    cp "$LAB"/etc/*.conf "/etc/netns/$P-$h/slurm/"
  done
  [ "$DBD" = 1 ] && dbd_conf
  declare -p NODES GPUS CPUS MEM DBD | sed 's/^declare -- //' > "$LAB/settings"
}
munge_up() {
  alive "$(pidof_file "$LAB/munge/munged.pid")" munged && return 0
  install -d -m 755 -o munge -g munge "$LAB/munge"
  [ -s "$LAB/munge/key" ] || (umask 077; head -c 128 /dev/urandom > "$LAB/munge/key"; chown munge:munge "$LAB/munge/key")
  rm -f "$LAB/munge/socket"*
  runuser -u munge -- /usr/sbin/munged --key-file="$LAB/munge/key" --socket="$LAB/munge/socket" \
    --pid-file="$LAB/munge/munged.pid" --log-file="$LAB/munge/munged.log" --seed-file="$LAB/munge/seed" 9>&-
}
ctld_up() {
  alive "$(pidof_file "$LAB/slurmctld.pid")" slurmctld && return 0
  on_ctl slurmctld < /dev/null > "$LAB/log/slurmctld.start" 2>&1 9>&- || { cat "$LAB/log/slurmctld.start" >&2; die "slurmctld did not start"; }
}
node_up() {
  local n=$1 i
  [ -n "$(init_pid "$n")" ] && return 0
  ip -n $P-ctl link set "p-$n" up
  install -d -m 755 "$LAB/$n/spool"; rm -f "$LAB/$n/init.pid"
  setsid ip netns exec $P-"$n" unshare --uts --pid --mount --fork -- \
    bash "$SELF" --node-init "$n" "$LAB" < /dev/null > "$LAB/log/init.$n.log" 2>&1 9>&- &
  for ((i = 0; i < 2400; i++)); do [ -n "$(init_pid "$n")" ] && [ -s "$LAB/$n/slurmd.pid" ] && return 0; sleep 0.05; done
  cat "$LAB/log/init.$n.log" >&2; die "node $n did not start"
}
node_init() { # PID 1 of a node; /proc is still the parent's here, so it names our outer PID
  local n=$1 lab=$2 outer
  read -r outer _ < /proc/self/stat
  mount -t proc proc /proc
  mount -t tmpfs -o size=4g,mode=1777 shm /dev/shm
  hostname "$n"; export HOSTNAME=$n
  rm -f "$lab/$n/slurmd.pid"
  trap : TERM INT HUP
  # -b: report a boot now (all nodes share one kernel's uptime). With ReturnToService=1 (see
  # SLURM_LAB_EXTRA) slurmctld then sees a quick power cycle: "Node unexpectedly rebooted"
  slurmd -b -N "$n"
  echo "$outer" > "$lab/$n/init.pid"
  while :; do sleep 1000 & wait $! || true; done      # bash reaps the orphans
}
node_kill() { local p; p=$(init_pid "$1")
  # The cable first: a machine without power sends no word that its connections are closed.
  ip -n $P-ctl link set "p-$1" down 2>/dev/null || true
  [ -z "$p" ] || kill -9 "$p"
  local i; for ((i = 0; i < 100; i++)); do alive "$p" || break; sleep 0.05; done; rm -f "$LAB/$1/init.pid" "$LAB/$1/slurmd.pid"; }

meet() { # a search for a neighbour that began during a cut fails up to 3 s after it
  local n other i
  for n in $(names); do for other in $(names); do
    for ((i = 0; i < 300; i++)); do
      on_node "$n" timeout 1 bash -c ": < /dev/tcp/$other/6818" 2>/dev/null && break
      sleep 0.2
    done
    [ $i -lt 300 ] || die "$n does not reach $other"
  done; done
}

# ---------------------------------------------------------------- accounting (optional)
dbd_conf() {
  cat > "$LAB/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$LAB/munge/socket
DbdHost=ctl
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
LogFile=$LAB/log/slurmdbd.log
PidFile=$LAB/slurmdbd.pid
CONF
  install -m 600 "$LAB/etc/slurmdbd.conf" "/etc/netns/$P-ctl/slurm/slurmdbd.conf"
}
dbd_up() {
  [ "$DBD" = 1 ] || return 0
  local i
  if ! alive "$(pidof_file "$LAB/mysql.pid")" mariadbd; then
    install -d -m 755 -o mysql -g mysql "$LAB/mysql" "$LAB/mysqlrun"
    [ -d "$LAB/mysql/mysql" ] || mariadb-install-db --no-defaults --user=mysql --datadir="$LAB/mysql" \
      --auth-root-authentication-method=socket --auth-root-socket-user=root --skip-test-db > "$LAB/log/mysql-install.log" 2>&1
    setsid mariadbd --no-defaults --user=mysql --datadir="$LAB/mysql" --socket="$LAB/mysqlrun/sock" --skip-networking \
      --pid-file="$LAB/mysqlrun/pid" --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 --skip-log-bin \
      --performance-schema=OFF < /dev/null > "$LAB/log/mysql.log" 2>&1 9>&- &
    echo $! > "$LAB/mysql.pid"
    for ((i = 0; i < 300; i++)); do
      mariadb --no-defaults -S "$LAB/mysqlrun/sock" -e 'select 1' > /dev/null 2>&1 && break
      alive "$(pidof_file "$LAB/mysql.pid")" mariadbd || { tail -5 "$LAB/log/mysql.log" >&2; die "mariadbd did not start"; }
      sleep 0.1
    done
  fi
  if ! alive "$(pidof_file "$LAB/slurmdbd.pid")" slurmdbd; then
    MYSQL_UNIX_PORT=$LAB/mysqlrun/sock on_ctl slurmdbd < /dev/null 9>&-
    for ((i = 0; i < 300; i++)); do on_ctl sacctmgr -n list cluster > /dev/null 2>&1 && break; sleep 0.1; done
    [ $i -lt 300 ] || { tail -5 "$LAB/log/slurmdbd.log" >&2; die "slurmdbd did not answer"; }
  fi
  on_ctl sacctmgr -i add cluster lab > /dev/null 2>&1 || true
}

# ---------------------------------------------------------------- whole cluster
healthy() {
  local n
  alive "$(pidof_file "$LAB/munge/munged.pid")" munged || return 1
  alive "$(pidof_file "$LAB/slurmctld.pid")" slurmctld || return 1
  [ "$DBD" = 0 ] || alive "$(pidof_file "$LAB/slurmdbd.pid")" slurmdbd || return 1
  for n in $(names); do [ -n "$(init_pid "$n")" ] || return 1; done
  [ "$(on_ctl timeout 10 sinfo -h -N -p debug -o '%T' 2>/dev/null | grep -cE '^(idle|planned|mixed|allocated|completing)$')" = "$NODES" ]
}
do_up() {
  do_install
  if [ -f "$LAB/settings" ] && ( . "$LAB/settings"; healthy ); then
    say "already up ($(tr '\n' ' ' < "$LAB/settings"))"; return 0
  fi
  do_down
  [ "$KEEP" = 1 ] || rm -rf "$LAB/state" "$LAB/mysql" "$LAB/log" "$LAB"/n*/spool
  write_conf; net_up; munge_up; dbd_up; ctld_up
  local n i; for n in $(names); do node_up "$n"; done
  for ((i = 0; i < 1200; i++)); do
    healthy && { say "up: $NODES nodes"; return 0; }
    [ ! -s "$LAB/slurmctld.pid" ] || alive "$(pidof_file "$LAB/slurmctld.pid")" slurmctld || { grep -E 'fatal|error' "$LAB/log/slurmctld.log" | tail -5 >&2; die "slurmctld died"; }
    sleep 0.1
  done
  tail -n 20 "$LAB"/log/*.log >&2; die "cluster did not become healthy"
}
do_down() {
  local n h
  for n in "$LAB"/n*/; do [ -d "$n" ] && node_kill "$(basename "$n")"; done
  stop_pid "$LAB/slurmctld.pid" slurmctld
  stop_pid "$LAB/slurmdbd.pid" slurmdbd
  stop_pid "$LAB/mysql.pid" mariadbd 20
  stop_pid "$LAB/munge/munged.pid" munged
  # what was started under `exec` and still runs (an srun that outlives its cluster would
  # kill the job of the same number in the next one)
  for n in $(ip netns pids $P-ctl 2>/dev/null); do kill -9 "$n" 2>/dev/null || true; done
  for h in /run/netns/$P-*; do [ -e "$h" ] && ip netns del "$(basename "$h")"; done
  rm -rf /etc/netns/$P-*; rmdir /etc/netns 2>/dev/null || true
  # another cluster of this kind may still stand
  compgen -G '/run/netns/*-ctl' > /dev/null || ip route del blackhole $NET.0/24 2>/dev/null || true
  rm -f "$LAB/settings"
}

cmd=${1:-}; shift || true
case $cmd in
  up|down|install)
    [ "$(ip netns identify $$ 2>/dev/null)" = "" ] || die "$cmd must be run outside the cluster's namespaces"
    exec 9> "/run/lock/$P.lock"; flock -w 300 9 || die "another slurm-up.sh is at work" ;;
esac
case $cmd in
  install) do_install ;;
  up) do_up ;;
  down) do_down; say down ;;
  status) healthy && r=0 || r=1; on_ctl timeout 10 sinfo -N -l || true; on_ctl timeout 10 squeue || true; exit $r ;;
  exec) [ $# -gt 0 ] || die "exec what?"; on_ctl "$@" ;;
  on) on_node "$@" ;;
  node-kill) node_kill "$1" ;;
  node-start) node_up "$1" ;;
  slurmd-kill) on_node "$1" sh -c "kill -9 \$(cat $LAB/$1/slurmd.pid); rm -f $LAB/$1/slurmd.pid" ;;
  slurmd-start) on_node "$1" slurmd -N "$1" ;;
  net-cut) ip -n $P-ctl link set p-"$1" down ;;
  net-join) ip -n $P-ctl link set p-"$1" up ;;
  link-cut) # a bridge forwards nothing between isolated ports; slurmctld sits on the bridge itself
    for n in $(names); do ip -n $P-ctl link set "p-$n" type bridge_slave isolated on; done ;;
  link-join) for n in $(names); do ip -n $P-ctl link set "p-$n" type bridge_slave isolated off; done; meet ;;
  ctld-restart) stop_pid "$LAB/slurmctld.pid" slurmctld; ctld_up ;;
  --node-init) node_init "$@" ;;
  *) sed -n '2,/^set -/p' "$SELF" | sed '$d; s/^# \{0,1\}//' >&2; exit 2 ;;
esac
