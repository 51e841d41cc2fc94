#!/bin/bash
# Packs what the project needs on a GPU machine without a network: scripts/gpu_bundle.sh OUT.tar.xz
#
# There:   mkdir site-packages && tar -xJf OUT.tar.xz -C site-packages
#          PYTHONPATH=site-packages:. HF_HUB_OFFLINE=1 python benchmarks/gpu.py
# (dill, and so datasets, takes packages in a folder of another name for code of the user.)
# For x86-64 Linux and Python 3.12, where a CUDA build of PyTorch with Triton, transformers,
# huggingface_hub, safetensors, einops, jaxtyping, numba, pandas, matplotlib, jinja2, rich, pytest
# and hypothesis are installed already. Versions are those of constraints.txt. To save room, what
# only the report (plotly's JavaScript), wandb's server and remote tables (Arrow's flight) need is
# left out: about 40 MB.
set -euo pipefail
out=$(realpath -m "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

platforms=()
for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${name}_x86_64")
done
python3 -m pip install --quiet --no-deps --no-compile --target "$work/site" \
  --constraint "$root/constraints.txt" \
  --python-version 3.12 --implementation cp --only-binary=:all: "${platforms[@]}" \
  sae-lens transformer-lens datasets pyarrow dill multiprocess xxhash docstring-parser \
  plotly plotly-express python-dotenv simple-parsing tenacity nltk beartype better-abc fancy-einsum \
  typeguard typing-inspection wandb platformdirs pydantic pydantic-core annotated-types click \
  opentelemetry-api opentelemetry-sdk opentelemetry-proto opentelemetry-semantic-conventions \
  opentelemetry-exporter-http-transport opentelemetry-exporter-otlp-common \
  opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-proto-http \
  googleapis-common-protos protobuf babe

cd "$work/site"
rm -rf wandb/bin plotly/package_data plotly/labextension share bin \
  pyarrow/include pyarrow/tests pyarrow/src pyarrow/libarrow_flight* pyarrow/libarrow_python_flight* \
  pyarrow/_flight* pyarrow/libarrow*.so.*.*.*
find . -name __pycache__ -type d -prune -exec rm -rf {} +
tar -cJf "$out" .
du -h "$out"
