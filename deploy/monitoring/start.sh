#!/usr/bin/env bash
# Prometheus, Alertmanager and Grafana with everything in place, for machines without Docker: starts those of the three that are
# installed, says how to get the others, and ends them with Ctrl-C. They answer at this machine's loopback alone, and keep what
# they know in ~/.local/state/rlhf_ray_monitoring, or where RLHF_RAY_MONITORING_DATA says.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=${RLHF_RAY_MONITORING_DATA:-${XDG_STATE_HOME:-$HOME/.local/state}/rlhf_ray_monitoring}
mkdir -p "$data"/{prometheus,alertmanager,grafana/logs,grafana/plugins}
declare -A names=()

first() { # the first of these programs that is installed
  local program
  for program in "$@"; do
    if command -v "$program" > /dev/null; then echo "$program"; return; fi
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
# The grafana that its package puts on the path reads /etc/grafana/grafana.ini, which other users may not.
home=${GRAFANA_HOME:-/usr/share/grafana}
grafana=$(first "$home/bin/grafana" grafana)

if [ -n "$prometheus" ]; then
  start prometheus http://127.0.0.1:9090 prometheus --config.file="$here/prometheus.yml" \
    --storage.tsdb.path="$data/prometheus" --web.listen-address=127.0.0.1:9090
else
  echo "prometheus is not installed: apt-get install prometheus, then systemctl disable --now prometheus, which has" \
    "the same port; or https://prometheus.io/download" >&2
fi
if [ -n "$alertmanager" ]; then
  start alertmanager http://127.0.0.1:9093 "$alertmanager" --config.file="$here/alertmanager.yml" \
    --storage.path="$data/alertmanager" --web.listen-address=127.0.0.1:9093 --cluster.listen-address=
else
  echo "alertmanager is not installed: apt-get install prometheus-alertmanager, then systemctl disable --now" \
    "prometheus-alertmanager, which has the same port; or https://prometheus.io/download" >&2
fi
if [ -n "$grafana" ]; then
  export GF_SERVER_HTTP_ADDR=127.0.0.1 GF_SERVER_HTTP_PORT=3000
  export GF_PATHS_DATA="$data/grafana" GF_PATHS_LOGS="$data/grafana/logs" GF_PATHS_PLUGINS="$data/grafana/plugins"
  export GF_PATHS_PROVISIONING="$here/grafana/provisioning" RLHF_RAY_DASHBOARDS="$here/dashboards"
  start grafana http://127.0.0.1:3000 "$grafana" server --homepath "$home"
else
  echo "grafana is not installed: https://grafana.com/grafana/download (its package, or an unpacked archive with GRAFANA_HOME)" >&2
fi

if [ ${#names[@]} -eq 0 ]; then exit 1; fi
code=0
wait -n -p ended "${!names[@]}" || code=$?
echo "${names[$ended]} ended with $code; the last lines of its log:" >&2
tail -n 5 "$data/${names[$ended]}.log" >&2
exit 1
