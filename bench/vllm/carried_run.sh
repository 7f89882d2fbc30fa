#!/bin/sh
# sh run.sh COMMAND...: runs a command in the checkout with the vLLM that lies beside this script.
# Unpacks it once, into DPSHM_VLLM_ENV or a folder of /tmp, and compiles it: else each of many processes would.
set -e
here=$(cd "$(dirname "$0")" && pwd)
: "${DPSHM_VLLM_ENV:=${TMPDIR:-/tmp}/dpshm-vllm-carried}"
export DPSHM_VLLM_ENV
packages=$DPSHM_VLLM_ENV/lib/python3.12/site-packages
if [ ! -e "$DPSHM_VLLM_ENV/carried" ]; then
  mkdir -p "$DPSHM_VLLM_ENV"
  tar -xJf "$here/vllm.tar.xz" -C "$DPSHM_VLLM_ENV"
  python3 -m compileall -q -j 0 "$packages" "$PWD/dpshm" "$PWD/bench" "$PWD/tests" >/dev/null || true
fi
export PYTHONPATH="$packages:$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$@"
