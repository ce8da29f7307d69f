# facepipe on NVIDIA GPUs: for `docker run --gpus`, and as a Ray node under KubeRay.
#   docker build -f infra/docker/gpu.Dockerfile -t facepipe:0.1.0-gpu .
#   docker run --rm --init --gpus all --shm-size=4g -v /photos:/photos:ro -v /gallery:/gallery facepipe:0.1.0-gpu embed /photos /gallery
#
# No nvidia/cuda base: torch's and FAISS's wheels bring the CUDA libraries they were built with (some 6 GB), and a second
# set in the base would only be a second thing to keep in step. The host gives the driver (NVIDIA container toolkit).
# On pinning the base by digest see cpu.Dockerfile.
FROM python:3.11.14-slim-trixie AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt infra/docker/gpu-constraints.txt ./
# The default index has torch==2.13.0 for CUDA; the check at the end fails on a mirror that serves the CPU build instead.
RUN pip install --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY facepipe facepipe
COPY pipelines pipelines
COPY jobs jobs
# ray[default]: the dashboard's agents take jobs from KubeRay and serve the metrics; ray[data,train] comes without them.
RUN pip install --constraint constraints.txt --constraint gpu-constraints.txt '.[gpu,s3,report]' 'ray[default]'
# opencv-python links Qt, X11 and Mesa (150 MB of Debian packages, none of them used); the headless build decodes the same.
RUN sed -n 's/^opencv-python==/opencv-python-headless==/p' constraints.txt > headless.txt \
    && pip uninstall --yes opencv-python \
    && pip install --no-deps --requirement headless.txt

FROM python:3.11.14-slim-trixie
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="facepipe" \
      org.opencontainers.image.description="Batch face embedding, on NVIDIA GPUs" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0"
# wget: KubeRay's probes call it where Ray or the operator is too old for HTTP probes. Its version is left to Debian, which
# removes old ones from its mirrors: a pinned one stops building within weeks.
RUN apt-get update \
    && apt-get install -y --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 facepipe \
    && useradd --create-home --uid 10001 --gid 10001 --shell /bin/bash facepipe
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# What the toolkit mounts into the container: compute for CUDA, utility for nvidia-smi, and no graphics.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# KubeRay starts Ray through `bash -lc` in most versions, and Debian's /etc/profile forgets PATH for a login shell.
RUN echo 'export PATH=/opt/venv/bin:$PATH' > /etc/profile.d/facepipe.sh
# By number: Kubernetes cannot tell that a name is not root (runAsNonRoot).
USER 10001:10001
WORKDIR /home/facepipe
# Builders have no GPU: the doctor reports it as missing, not as broken. torch must be a CUDA build all the same.
RUN facepipe doctor \
    && python -c "import torch; assert torch.version.cuda, f'torch {torch.__version__} is a CPU build'" \
    && python -c "import faiss; assert hasattr(faiss, 'StandardGpuResources'), 'FAISS without GPU'" \
    && bash -lc 'ray --version && ray job submit --help > /dev/null && wget --version > /dev/null'
ENTRYPOINT ["facepipe"]
