#!/usr/bin/env bash
# Fail-over time as clients see it: a node of three is killed (-9) under load and started again, in turn.
#
#   bench/failover.sh             20 kills
#   bench/failover.sh --kills 5
#
# Starts an etcd of three, a PostgreSQL and three nodes of one core each on loopback (packages etcd-server and postgresql-15),
# with 24 SDK users of whom each writes to two others ten times a second and tries each message for a second. Prints a row
# for each kill and each start, and then over all: for how long nothing of a sender was accepted, for users of the node, for
# others who write to them, and for all others. In the end a ledger of what every sender was told is held against
# the logs: a run whose messages are not all there once fails.
#
# Environment: PROFILE, of cargo (release); RINGLINE_TEST_PG_BIN, the folder of the programs of another PostgreSQL.
set -euo pipefail
cd "$(dirname "$0")/.."

kills=20
while [ $# -gt 0 ]; do
  case $1 in
    --kills) kills=$2; shift 2 ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
done

RINGLINE_TEST_KILLS=$kills exec cargo test --profile "${PROFILE:-release}" -p ringline --test cluster_faults -- --nocapture fail_over_time
