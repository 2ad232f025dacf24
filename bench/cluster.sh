#!/usr/bin/env bash
# What it costs that there are several nodes: pairs within a node and across two, beside one node alone, and nodes that idle.
#
#   bench/cluster.sh              a static cluster of two nodes on loopback, one core each
#   bench/cluster.sh --nodes 3    of three
#
# Prints messages delivered a second, of CPU a second what all nodes took together, and messages a CPU second beside those of
# the node alone: the ratio is what a message across nodes costs more. Then what the nodes take while nobody is there.
# Links are without TLS with --tls off; the default is as in production. The generator has the last core, nodes the others
# in turn: on a machine with fewer cores than nodes they share them, and the rates say little, the CPU seconds more.
#
# Environment: SERVER and BENCH, binaries to use instead of building them; MEASURE_S, seconds measured (5); IDLE_S (10);
# CLIENTS (200); WINDOW, sends each keeps unanswered (16); PORT, four ports a node from here (9820). System calls are counted
# where perf is there and may trace (root, or kernel.perf_event_paranoid below 0).
set -euo pipefail
cd "$(dirname "$0")/.."

nodes=2 tls=on
while [ $# -gt 0 ]; do
  case $1 in
    --nodes) nodes=$2; shift 2 ;;
    --tls) tls=$2; shift 2 ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
done

command -v curl >/dev/null || { echo "curl is needed" >&2; exit 2; }
target=${CARGO_TARGET_DIR:-target}
if [ -z "${SERVER:-}" ]; then
  cargo build --release -p ringline
  SERVER=$target/release/ringline
fi
if [ -z "${BENCH:-}" ]; then
  cargo build --release -p ringline-bench
  BENCH=$target/release/ringline-bench
fi
measure_s=${MEASURE_S:-5} idle_s=${IDLE_S:-10} clients=${CLIENTS:-200} window=${WINDOW:-16} port=${PORT:-9820}
cpus=$(nproc)
generator=$((cpus - 1)) shared=$((cpus > 1 ? cpus - 1 : 1))
folder=$(mktemp -d)
pids=()
finish() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait
  rm -rf "$folder"
}
trap finish EXIT

names=(a b c d e f g h)
[ "$nodes" -ge 2 ] && [ "$nodes" -le ${#names[@]} ] || { echo "--nodes: 2 to ${#names[@]}" >&2; exit 2; }
names=("${names[@]:0:nodes}")
client() { echo "127.0.0.1:$((port + 4 * $1))"; }
peer() { echo "127.0.0.1:$((port + 4 * $1 + 1))"; }
admin() { echo "127.0.0.1:$((port + 4 * $1 + 2))"; }
"$SERVER" certs init "$folder/certs" --nodes "$(IFS=,; echo "${names[*]}")" >/dev/null
list=
for at in $(seq 0 $((nodes - 1))); do list+="${list:+,}${names[at]}@$(peer "$at")/$(client "$at")"; done

start() { # start AT SETTING...: a node, ready
  local at=$1 log="$folder/log-$1" arguments=()
  shift
  for setting in "$@"; do arguments+=(--set "$setting"); done
  rm -rf "$folder/data-$at"
  "$SERVER" serve --data-dir "$folder/data-$at" --listen "$(client "$at")" --cores "$((at % shared))-$((at % shared))" \
    --set "admin.listen=$(admin "$at")" --set "auth.issuer=$folder/certs/issuer.pem" "${arguments[@]}" 2>"$log" &
  pids+=($!)
  for _ in $(seq 600); do
    grep -q "ready on" "$log" && return
    sleep 0.1
  done
  cat "$log" >&2
  exit 1
}

stop_all() {
  for pid in "${pids[@]}"; do
    # Dead before it was told to, or not ended in order: then the figures are of no server that works.
    kill "$pid" && wait "$pid" || { echo "a node did not end in order" >&2; exit 1; }
  done
  pids=()
}

start_cluster() {
  local at
  for at in $(seq 0 $((nodes - 1))); do
    start "$at" "node.name=${names[at]}" cluster.mode=static "cluster.nodes=$list" "cluster.tls=$tls" \
      "cluster.ca=$folder/certs/ca.pem" "cluster.cert=$folder/certs/${names[at]}.pem" "cluster.key=$folder/certs/${names[at]}.key"
  done
  for at in $(seq 0 $((nodes - 1))); do
    for _ in $(seq 100); do
      "$SERVER" cluster status --admin "$(admin "$at")" >/dev/null && continue 2
      sleep 0.1
    done
    echo "the nodes do not see each other" >&2
    exit 1
  done
}

field() { grep -o "\"$1\":[0-9.]*" "$folder/result" | head -1 | cut -d: -f2; }

alone=
load() { # load NAME TARGETS ARGUMENT...
  local name=$1 targets=$2 delivered cpu
  shift 2
  "$BENCH" run --target "$targets" --clients "$clients" --scenario pair --window "$window" --cores "$generator" \
    --duration "$measure_s" --warmup 1 --issuer-key "$folder/certs/issuer.pem" --no-progress --json "$folder/result" "$@" \
    >"$folder/bench" || { cat "$folder/bench" >&2; exit 1; }
  delivered=$(field delivered_per_s) cpu=$(field server_cpu_s)
  awk -v name="$name" -v delivered="$delivered" -v cpu="$cpu" -v seconds="$measure_s" -v alone="$alone" 'BEGIN {
    each = cpu > 0 ? delivered * seconds / cpu : 0
    printf "%-34s %12.0f %10.2f %14.0f %8s\n", name, delivered, cpu / seconds, each, alone ? sprintf("%.2f", each / alone) : "1"
  }'
  [ -n "$alone" ] || alone=$(awk -v delivered="$delivered" -v cpu="$cpu" -v seconds="$measure_s" \
    'BEGIN { print cpu > 0 ? delivered * seconds / cpu : 0 }')
}

ticks() { local sum=0 pid; for pid in "${pids[@]}"; do sum=$((sum + $(awk '{ print $14 + $15 }' "/proc/$pid/stat"))); done; echo $sum; }
link_bytes() {
  local at
  for at in $(seq 0 $((nodes - 1))); do curl -sf "http://$(admin "$at")/metrics"; done |
    awk '$1 ~ /^ringline_peer_sent_bytes_total/ { sum += $2; found = 1 } END { if (!found) exit 1; printf "%d", sum }'
}

idle() {
  local before after bytes calls=-
  sleep 3
  bytes=$(link_bytes) || { echo "the nodes tell nothing of their links" >&2; exit 1; }
  before=$(ticks)
  if perf stat -x, -e raw_syscalls:sys_enter -p "$(IFS=,; echo "${pids[*]}")" -o "$folder/perf" -- sleep "$idle_s" 2>/dev/null; then
    calls=$(awk -F, -v seconds="$idle_s" -v nodes="$nodes" '/sys_enter/ { printf "%.0f", $1 / seconds / nodes }' "$folder/perf")
  else
    sleep "$idle_s"
  fi
  after=$(ticks)
  bytes=$(($(link_bytes) - bytes))
  awk -v ticks=$((after - before)) -v hertz="$(getconf CLK_TCK)" -v seconds="$idle_s" -v bytes="$bytes" -v calls="$calls" -v nodes="$nodes" \
    'BEGIN { printf "%d nodes idle for %d s, each: %.3f %% of a core, %s system calls/s, %.0f bytes/s sent on links\n", nodes, seconds,
      100 * ticks / hertz / seconds / nodes, calls, bytes / seconds / nodes }'
}

targets=
for at in $(seq 0 $((nodes - 1))); do targets+="${targets:+,}$(client "$at")"; done
printf '%d nodes, %d clients with %d sends unanswered, %s s, links with tls %s, %d cores for the nodes\n' \
  "$nodes" "$clients" "$window" "$measure_s" "$tls" "$((nodes < shared ? nodes : shared))"
printf '%-34s %12s %10s %14s %8s\n' "" "delivered/s" "cores used" "a core second" "ratio"
for class in transient durable; do
  alone=
  start 0
  load "$class, one node alone" "$(client 0)" --class "$class"
  stop_all
  start_cluster
  load "$class, pairs within a node" "$targets" --class "$class" --pairs within
  load "$class, pairs across two nodes" "$targets" --class "$class" --pairs across
  [ "$class" = transient ] || idle
  stop_all
done
