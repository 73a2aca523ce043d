#!/bin/sh
# One machine, or several with the same folder: run this line on each of them, with the first one's address.
#   NODES=4 HOST=node0 examples/launch/torchrun.sh --data /data/tokens --train.steps 10000
# Whatever ends it, the same line goes on: --resume continues the run that DIR holds.
set -eu
DIR="${DIR:-runs/job}"
exec torchrun \
  --nnodes "${NODES:-1}" \
  --nproc-per-node "${PROCESSES:-gpu}" \
  --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HOST:-localhost}:${PORT:-29400}" \
  --rdzv-id "${JOB:-danlu}" \
  -m danlu train "${RECIPE:-lm}" --out "$DIR" --resume "$@"
