#!/usr/bin/env bash
# Installs megatron_paint into an image with the developer files of CUDA 13 and cuDNN: Debian's or Ubuntu's packages,
# torch, optionally Apex, and the package with Transformer Engine. Both recipes of this folder call it, part by part:
#   install.sh system | torch | apex | package FOLDER
# Variables: VENV (the virtual environment), TORCH (a requirement such as torch==2.13.0), EXTRAS (of the package),
# APEX_REF (branch, tag or commit of NVIDIA/apex), TORCH_CUDA_ARCH_LIST (for which GPUs Apex is built), MAX_JOBS.
set -euo pipefail

venv=${VENV:-/opt/megatron_paint}

pip() {
    "$venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check "$@"
}

system() {
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential ca-certificates cmake git ninja-build python3 python3-dev python3-venv
    rm -rf /var/lib/apt/lists/*
    python3 -m venv "$venv"
}

torch() {
    # Transformer Engine and Apex compile against this torch, so their builds are not isolated and need these tools.
    pip --upgrade pip "setuptools>=68" wheel packaging ninja pybind11
    pip "${TORCH:-torch>=2.8}"
}

apex() {
    folder=$(mktemp -d)
    git clone --filter=blob:none https://github.com/NVIDIA/apex "$folder"
    git -C "$folder" checkout "${APEX_REF:-master}"
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip --no-build-isolation "$folder" \
        --config-settings "--build-option=--cpp_ext" --config-settings "--build-option=--cuda_ext"
    rm -rf "$folder"
}

package() {
    extras=${EXTRAS-gpu,tensorboard}
    NVTE_FRAMEWORK=pytorch pip --no-build-isolation "$1${extras:+[$extras]}"
    "$venv/bin/megatron-paint" --version
}

case "${1:-}" in
    system | torch | apex) "$1" ;;
    package) package "${2:?give the folder of the package}" ;;
    *)
        echo "usage: install.sh system | torch | apex | package FOLDER" >&2
        exit 2
        ;;
esac
