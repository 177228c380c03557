# Sourced by the launchers of the five stages: `launch SCRIPT OPTIONS...` runs a script of the
# repository's root under torchrun, on the processes and nodes that these variables say. A single
# process needs no torchrun, nor does one that a scheduler has started and given its RANK
# (slurm/train.sbatch). What runs takes the place of this shell, so that signals reach it and its
# exit code is the launcher's: `launch` comes last.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
GPUS="${GPUS:-1}"                      # processes on this node: one a GPU (one is enough on a CPU)
NODES="${NODES:-1}"                    # nodes; start the same command on each of them
RDZV_ENDPOINT="${RDZV_ENDPOINT:-}"     # host:port of one of the nodes, the same on all (NODES > 1)
RESTARTS="${RESTARTS:-0}"              # times that all processes start again after one has failed

command -v torchrun > /dev/null || PATH="$PWD/.venv/bin:$PATH"
if ! command -v torchrun > /dev/null; then
    echo "error: torchrun is not found; activate an environment with requirements.txt installed" >&2
    exit 2
fi

launch() {
    local python
    python="$(dirname "$(command -v torchrun)")/python"
    [ -x "$python" ] || python=python
    if [ -n "${RANK:-}" ] || { [ "$NODES" -eq 1 ] && [ "$GPUS" = 1 ]; }; then
        exec "$python" "$@"
    fi
    local nodes=(--standalone)
    if [ "$NODES" -gt 1 ]; then
        if [ -z "$RDZV_ENDPOINT" ]; then
            echo "error: NODES=$NODES needs RDZV_ENDPOINT=host:port, the same on every node" >&2
            exit 2
        fi
        nodes=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT" --rdzv_id fibldm)
    fi
    exec "$python" scripts/launch.py "${nodes[@]}" --nproc_per_node "$GPUS" \
        --max-restarts "$RESTARTS" --signals_to_handle SIGINT,SIGTERM,SIGHUP,SIGQUIT,SIGUSR1 "$@"
}
