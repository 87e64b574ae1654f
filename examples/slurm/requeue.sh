# Read by the scripts beside it: runs a command, and puts the job back in the queue where it was stopped by a signal.

# After SIGTERM a lineage finishes its step, saves a checkpoint and leaves. So the signals of SLURM to this script are
# handed on as SIGTERM to the job's steps, and the script waits for them. What fails by itself is not repeated.
run_and_requeue() {
  local stopped="" status=0
  trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 TERM
  "$@" &
  local child=$!
  while kill -0 "$child" 2>/dev/null; do
    wait "$child" # a signal ends the wait, not the command
  done
  wait "$child"
  status=$?
  trap - USR1 TERM
  if [ -n "$stopped" ] && [ "$status" -ne 0 ]; then
    echo "Stopped by a signal, exit status $status: the job goes back in the queue."
    scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$status"
}
