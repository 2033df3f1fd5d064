# CPU:  docker build -t cxr-focus .
# CUDA: docker build -t cxr-focus:cuda --build-arg BASE=nvidia/cuda:12.6.3-runtime-ubuntu24.04 \
#         --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
# docker run --rm -v "$PWD":/work --shm-size 8g [--gpus all] cxr-focus accelerate launch ... (loaders share batches through /dev/shm)
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
RUN command -v python3 >/dev/null \
 || (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*)
RUN python3 -m venv /opt/venv \
 && pip install --no-cache-dir torch torchvision --index-url "${TORCH_INDEX}"
COPY pyproject.toml README.md LICENSE accelerate_config.yaml /src/
COPY shards /src/shards
COPY trainer /src/trainer
COPY launch /src/launch
RUN pip install --no-cache-dir "/src[tensorboard,dicom,http,s3,gcs,onnx]" && rm -rf /src
# Nothing needs root; what is written lies in /work
RUN useradd --create-home --uid 1000 cxr && mkdir /work && chown cxr /work || true
USER 1000
WORKDIR /work
CMD ["cxr-train", "--help"]
