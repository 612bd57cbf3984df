#!/usr/bin/env bash
# Prometheus, Alertmanager and Grafana with everything in place, for machines without Docker: starts those of the three that are
# installed, says how to get the others, and ends them with Ctrl-C. They answer at this machine's loopback alone, and keep what
# they know in ~/.local/state/rlhf_ray_monitoring, or where RLHF_RAY_MONITORING_DATA says.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=${RLHF_RAY_MONITORING_DATA:-${XDG_STATE_HOME:-$HOME/.local/state}/rlhf_ray_monitoring}
mkdir -p "$data"/{prometheus,alertmanager,grafana}
declare -A names=()

first() { # the first of these programs that is installed, and its further words
  local program
  for program in "$@"; do
    if command -v "${program%% *}" > /dev/null; then echo "$program"; return; fi
  done
}

start() { # NAME ADDRESS COMMAND...
  local name=$1 address=$2
  shift 2
  "$@" > "$data/$name.log" 2>&1 &
  names[$!]=$name
  echo "$name: $address (log: $data/$name.log)"
}

finish() {
  trap - INT TERM EXIT
  for process in "${!names[@]}"; do kill "$process" 2> /dev/null || true; done
  wait
}
trap finish EXIT
trap 'exit 0' INT TERM

prometheus=$(first prometheus)
alertmanager=$(first alertmanager prometheus-alertmanager)
grafana=$(first "grafana server" grafana-server)

if [ -n "$prometheus" ]; then
  start prometheus http://127.0.0.1:9090 prometheus --config.file="$here/prometheus.yml" \
    --storage.tsdb.path="$data/prometheus" --web.listen-address=127.0.0.1:9090
else
  echo "prometheus is not installed: apt-get install prometheus, or https://prometheus.io/download" >&2
fi
if [ -n "$alertmanager" ]; then
  start alertmanager http://127.0.0.1:9093 "$alertmanager" --config.file="$here/alertmanager.yml" \
    --storage.path="$data/alertmanager" --web.listen-address=127.0.0.1:9093 --cluster.listen-address=
else
  echo "alertmanager is not installed: apt-get install prometheus-alertmanager, or https://prometheus.io/download" >&2
fi
if [ -n "$grafana" ]; then
  export GF_SERVER_HTTP_ADDR=127.0.0.1 GF_SERVER_HTTP_PORT=3000 GF_PATHS_DATA="$data/grafana"
  export GF_PATHS_PROVISIONING="$here/grafana/provisioning" RLHF_RAY_DASHBOARDS="$here/dashboards"
  # shellcheck disable=SC2086 # "grafana server" is two words
  start grafana http://127.0.0.1:3000 $grafana --homepath "${GRAFANA_HOME:-/usr/share/grafana}"
else
  echo "grafana is not installed: https://grafana.com/grafana/download (its package, or an unpacked archive with GRAFANA_HOME)" >&2
fi

if [ ${#names[@]} -eq 0 ]; then exit 1; fi
code=0
wait -n -p ended "${!names[@]}" || code=$?
echo "${names[$ended]} ended with $code; the last lines of its log:" >&2
tail -n 5 "$data/${names[$ended]}.log" >&2
exit 1
