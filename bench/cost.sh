#!/usr/bin/env bash
# What a message costs the server's core: system calls, switches, allocations, and with valgrind instructions and copies.
#
#   bench/cost.sh                  counts, over the ring: each load, transient and durable
#   bench/cost.sh --net epoll      the same over epoll
#   bench/cost.sh --instructions   the same, and a small one, under callgrind: instructions and calls of memcpy a message
#
# The server has core 0, the load generator core 1. Counts are exact whatever else the machine does: what happened in the
# measured seconds, by the server's own metrics, divided by the messages delivered in them. A busy machine makes smaller or
# larger batches, so repeat. Needs perf and curl, and the right to trace (root, or kernel.perf_event_paranoid below 0).
#
# Environment: SERVER and BENCH, binaries to use instead of building them (the server with the feature
# count-allocations); MEASURE_S, seconds measured (2); PORT, two ports from here (9803).
set -euo pipefail
cd "$(dirname "$0")/.."

net=ring instructions=no
while [ $# -gt 0 ]; do
  case $1 in
    --net) net=$2; shift 2 ;;
    --instructions) instructions=yes; net=epoll; shift ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
done

need() { command -v "$1" >/dev/null || { echo "$1 is needed" >&2; exit 2; }; }
need curl
target=${CARGO_TARGET_DIR:-target}
if [ -z "${SERVER:-}" ]; then
  cargo build --release -p ringline --features count-allocations
  SERVER=$target/release/ringline
fi
if [ -z "${BENCH:-}" ]; then
  cargo build --release -p ringline-bench
  BENCH=$target/release/ringline-bench
fi
measure_s=${MEASURE_S:-2} port=${PORT:-9803}
folder=$(mktemp -d)
server= bench=
finish() {
  [ -z "$bench" ] || kill "$bench" 2>/dev/null || true
  [ -z "$server" ] || kill "$server" 2>/dev/null || true
  wait
  rm -rf "$folder"
}
trap finish EXIT

start_server() { # start_server [COMMAND PREFIX]
  rm -rf "$folder/data"
  taskset -c 0 "$@" "$SERVER" serve --data-dir "$folder/data" --listen "127.0.0.1:$port" --cores 0-0 \
    --set "net.kind=$net" --set "admin.listen=127.0.0.1:$((port + 1))" 2>"$folder/log" &
  server=$!
  for _ in $(seq 600); do
    grep -q "ready on" "$folder/log" && return
    sleep 0.1
  done
  cat "$folder/log" >&2
  exit 1
}

stop_server() {
  # Dead before it was told to, or not ended in order: then the figures are of no server that works.
  kill "$server" && wait "$server" || { echo "the server did not end in order" >&2; exit 1; }
  server=
}

stop_load() {
  # Gone before it was told to: then what was measured was no load.
  kill "$bench" || { cat "$folder/bench" >&2; echo "the load ended before it was measured" >&2; exit 1; }
  # It ends by the signal, so its exit code says nothing.
  wait "$bench" 2>/dev/null || true
  bench=
}

start_load() { # start_load CLIENTS WINDOW DURATION_S ARGUMENT...
  local clients=$1 window=$2 duration=$3
  shift 3
  "$BENCH" run --target "127.0.0.1:$port" --clients "$clients" --scenario pair --window "$window" --cores 1 \
    --duration "$duration" --warmup 1 --issuer-key "$folder/data/issuer.pem" --no-progress "$@" >"$folder/bench" 2>&1 &
  bench=$!
}

# Waits until messages flow, and a second more.
wait_for_load() {
  for _ in $(seq 600); do
    scrape "$folder/flow"
    [ "$(value "$folder/flow" ringline_delivered_total)" -gt 1000 ] && break
    sleep 0.1
  done
  sleep 1
}

scrape() { curl -sf "http://127.0.0.1:$((port + 1))/metrics" >"$1"; }
value() { awk -v name="$2" 'index($1, name "{") == 1 { sum += $2 } END { printf "%d", sum }' "$1"; }
# The executor's helper thread inherits the name; the core's own is the older one.
core_thread() { grep -lx core-0 /proc/"$server"/task/*/comm | cut -d/ -f5 | sort -n | head -1; }
switches() { awk '$1 == "voluntary_ctxt_switches:" { print $2 }' "/proc/$server/task/$1/status"; }

counts() { # counts NAME CLIENTS WINDOW ARGUMENT...
  local name=$1 clients=$2 window=$3 thread before after calls
  shift 3
  start_server
  thread=$(core_thread)
  start_load "$clients" "$window" $((measure_s + 6)) "$@"
  wait_for_load
  before=$(switches "$thread")
  scrape "$folder/before"
  perf stat -x, -e raw_syscalls:sys_enter -t "$thread" -o "$folder/perf" -- sleep "$measure_s"
  scrape "$folder/after"
  after=$(switches "$thread")
  calls=$(awk -F, '/sys_enter/ { print $1 }' "$folder/perf")
  stop_load
  stop_server
  local fields="" metric
  for metric in delivered requests turns allocations reallocations store_commits; do
    fields+=" $(($(value "$folder/after" "ringline_${metric}_total") - $(value "$folder/before" "ringline_${metric}_total")))"
  done
  awk -v name="$name" -v calls="$calls" -v switches=$((after - before)) -v seconds="$measure_s" -v fields="$fields" 'BEGIN {
    split(fields, f, " ")
    d = f[1]
    if (d == 0) { print name ": nothing was delivered"; exit 1 }
    printf "%-28s %9.0f/s %8.4f %9.5f %8.4f %8.4f %8.1f %8.1f\n", name, d / seconds, calls / d, switches / d,
      f[4] / d, f[5] / d, f[2] / (f[3] + 1), f[6] ? d / f[6] : 0
  }'
}

instructions() { # instructions NAME CLIENTS WINDOW ARGUMENT...
  local name=$1 clients=$2 window=$3 file messages
  shift 3
  start_server valgrind --tool=callgrind --instr-atstart=no --separate-threads=yes \
    --callgrind-out-file="$folder/callgrind"
  start_load "$clients" "$window" 600 "$@"
  wait_for_load
  callgrind_control --instr=on "$server" >/dev/null
  # Under callgrind a commit of many clients takes seconds.
  sleep $((measure_s + clients / 250))
  callgrind_control --dump "$server" >/dev/null
  stop_load
  stop_server
  # One file a thread and dump: the core's is the one of the first dump in which most was done.
  file=$(awk '$1 == "totals:" { print $2, FILENAME }' "$folder"/callgrind.1-* | sort -n | tail -1 | cut -d' ' -f2)
  callgrind_annotate --threshold=100 --tree=caller "$file" >"$folder/tree"
  # Each delivery is written once: the profile counts its own messages, as the calls of the functions that write them.
  messages=$(awk '
    / < / { if (match($0, /\([0-9,]+x\)/)) { calls = substr($0, RSTART + 1, RLENGTH - 3); gsub(",", "", calls); sum += calls }; next }
    / \* / { if ($0 ~ /hot::write::write_message|PlainSend.*::deliver/) written += sum; sum = 0 }
    END { if (written) print written }' "$folder/tree")
  [ -n "$messages" ] || { echo "the profile shows no message that was written" >&2; exit 1; }
  printf '%s: %s messages\n' "$name" "$messages"
  awk -v n="$messages" '
    /PROGRAM TOTALS/ { gsub(",", "", $1); printf "  instructions a message %.0f, and copies by their callers:\n", $1 / n }
    / < / { callers[++count] = $0; next }
    / \* / {
      if ($0 ~ /mem(cpy|move)/) for (i = 1; i <= count; i++) if (match(callers[i], /\([0-9,]+x\)/)) {
        calls = substr(callers[i], RSTART + 1, RLENGTH - 3)
        gsub(",", "", calls)
        caller = callers[i]
        sub(/.* < [^ ]*\.rs:/, "", caller)
        sub(/ \(.*/, "", caller)
        if (calls / n >= 0.05) printf "  %6.2f %s\n", calls / n, caller
      }
      count = 0
    }' "$folder/tree"
  rm -f "$folder"/callgrind*
}

echo "machine: $(uname -r), $(nproc) cores, net.kind=$net, commit $(git rev-parse --short HEAD)"
if [ $instructions = yes ]; then
  need valgrind
  for load in "20 16" "200 16" "5000 8"; do
    read -r clients window <<<"$load"
    for class in transient durable; do instructions "${clients}x${window} $class" "$clients" "$window" --class $class; done
  done
  exit
fi
need perf
printf '%-28s %11s %8s %9s %8s %8s %8s %8s\n' "a delivered message" rate syscalls switches allocs reallocs req/turn msg/sync
for load in "200 16" "5000 8"; do
  read -r clients window <<<"$load"
  counts "${clients}x${window} transient" "$clients" "$window" --class transient
  counts "${clients}x${window} durable" "$clients" "$window" --class durable
done
